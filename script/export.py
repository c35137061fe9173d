"""Export a ChatGLM2 or ChatGLM3, with its adapter, as a folder that runs where this project is not installed.

python script/export.py --to glm --base MODEL [--adapter FOLDER] --output FOLDER [--into trained|full] [--dtype TYPE]
python script/export.py --to gguf --base MODEL [--adapter FOLDER] --output FOLDER [--into trained|full] [--type TYPE]
python script/export.py --to adapter --base MODEL --adapter FOLDER --output FOLDER

glm: for transformers without this project, vLLM and SGLang: GlmForCausalLM with tokenizer.json and a chat template.
gguf: for llama.cpp, Ollama and LM Studio. adapter: the adapter alone, for both. An adapter is merged as
script/merge_lora.py merges it. OUTPUT is a folder, for gguf too, and appears only when it is whole; a killed export
leaves .tmp-OUTPUT beside it, which the next one of that name removes. docs/deploy.md has the command of each server.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=("glm", "gguf", "adapter"), required=True, help="what is made")
    parser.add_argument("--base", metavar="MODEL", help="folder or hub name [the folder in adapter_config.json]")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="such as output/x/final [the base alone]")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not exist")
    parser.add_argument("--into", choices=("trained", "full"), help="the base's values of training, or its own")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of glm [the base's own]")
    parser.add_argument("--type", choices=("f16", "bf16", "q8_0", "f32"), help="of the numbers of gguf [f16]")
    parser.add_argument("--max_shard_size", metavar="SIZE", help="of one file of glm, at most [2GB]")
    cli = parser.parse_args()

    from component.run.process import run_program

    run_program(
        lambda watch: export(cli),
        lambda: f"stopped; {cli.output} {'is there' if cli.output.exists() else 'was not made'}",
    )


def export(cli: argparse.Namespace) -> None:
    from component.export.exports import plan_export
    from component.export.output import check_output, check_room, make_output

    check_output(cli.output, cli.max_shard_size)
    made = plan_export(
        cli.to,
        cli.base,
        cli.adapter,
        into=cli.into,
        dtype=cli.dtype,
        kind=cli.type,
        max_shard_size=cli.max_shard_size,
        name=cli.output.name,
    )
    check_room(cli.output, made.size)
    for note in make_output(cli.output, made.write):
        print(note)
    print(f"{cli.to}: {cli.output}")


if __name__ == "__main__":
    main()
