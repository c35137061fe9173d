"""Check the published weights of a ChatGLM2-6B or ChatGLM3-6B (also -32k and -Base) with this code, step by step.

python script/verify_real.py MODEL [--base_bits 4 | 16] [--output FILE]

MODEL is a folder or hub name. Each step passes, fails or is skipped, and none of them stops the others: tensors,
tokenizer, loss of plain text, wiring, a function call, ten updates of training, and a chat before and after. The report
in Markdown is printed and written to FILE: please paste it into an issue. It holds no paths of yours and no secrets.

Exit code 0: no step failed; 1: a step failed; 2: MODEL cannot be checked.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# docs/speed.md has what was measured of training a 6B.
COST = (
    "the weights (12.5 GB of a 6B) are read four times and $TMPDIR needs 1 GB; a card needs {least} GiB of free "
    "memory, and training takes up to {most}"
)
MEMORY = {4: {"least": 6, "most": 24}, 16: {"least": 14, "most": 32}}  # of 16 bits by estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="such as THUDM/chatglm3-6b or /models/chatglm3-6b")
    parser.add_argument(
        "--base_bits", type=int, default=4, choices=MEMORY, help="bits of the base, as in a settings file [4]"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("verify_real.md"), metavar="FILE", help="for the report [verify_real.md]"
    )
    cli = parser.parse_args()

    from component.run.process import run_program

    run_program(lambda watch: verify(cli), lambda: f"stopped; {cli.output} has the steps that were done")


def verify(cli: argparse.Namespace) -> None:
    from loguru import logger

    from component.model import warn_of_cpu
    from component.run.errors import ArgumentError, unusable
    from component.run.files import write_atomically
    from component.verify.report import describe_machine, write_report
    from component.verify.steps import FAILED, ROOT, StepsFailed, Verification

    if cli.output.is_symlink() or (cli.output.exists() and not cli.output.is_file()):
        raise ArgumentError(f"--output {cli.output}: a link or no file; give the name of a file")
    model = os.path.abspath(cli.model) if os.path.isdir(cli.model) else cli.model
    with tempfile.TemporaryDirectory(prefix="verify_real-") as folder:
        verification = Verification(model, Path(folder), cli.base_bits)
        hidden = {folder: "TEMPORARY", str(ROOT): "LUCIOLE", os.path.expanduser("~"): "~", model: verification.name}
        warn_of_cpu(verification.args)
        logger.info(COST.format(**MEMORY[cli.base_bits]))
        machine, findings = describe_machine() | {"base_bits": cli.base_bits}, []

        def save() -> str:
            report = write_report(verification.name, machine, findings, hidden)
            try:
                write_atomically(cli.output, report.encode())
            except OSError as error:
                raise unusable(f"--output {cli.output}: could not be written ({error})", error, ArgumentError) from None
            return report

        report = save()  # before what takes long, and after every step, in case that the next brings the machine down
        for finding in verification.run():
            findings.append(finding)
            logger.info(f"{finding.result}: {finding.step}")
            report = save()
    print(report)
    logger.info(f"please paste the report into an issue: {cli.output}")
    if failed := [finding.step for finding in findings if finding.result == FAILED]:
        raise StepsFailed(f"{len(failed)} of {len(findings)} steps failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
