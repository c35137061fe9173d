"""Quick check that a model which is no folder can be had, from the hub or its cache."""

import functools
import os
from threading import Thread

import huggingface_hub
from huggingface_hub import constants
from loguru import logger

from .errors import ArgumentError

PATIENCE = 5  # seconds, unless HF_HUB_ETAG_TIMEOUT says otherwise
# Publishers whose models lie under another name on ModelScope.
ON_MODELSCOPE = {"THUDM": "ZhipuAI", "zai-org": "ZhipuAI", "meta-llama": "LLM-Research"}


def require_hub_or_cache(
    name: str,
    setting: str = "model_name_or_path",
    files: tuple[str, ...] = ("config.json", "the tokenizer", "*.safetensors"),
) -> None:
    """Make sure within seconds that the hub answers or the model is in its cache; the hub's library would take minutes.

    If the hub does not answer, it is not asked again: later loads use the cache alone.

    Args:
        setting: the one that gives the name.
        files: what a folder in its place must hold. The first must be in the cache.

    Raises:
        ArgumentError: the hub does not answer and the cache lacks the model. The text lists other ways to get it.
    """
    reason = "HF_HUB_OFFLINE is set" if huggingface_hub.is_offline_mode() else silence_of(constants.ENDPOINT)
    if not reason:
        return
    if not isinstance(huggingface_hub.try_to_load_from_cache(name, files[0]), str):
        publisher, slash, last = name.rpartition("/")
        there = f"{ON_MODELSCOPE.get(publisher, publisher)}{slash}{last}"
        raise ArgumentError(
            f"{name!r} is no folder in {os.getcwd()} and not in the cache, and the hub {constants.ENDPOINT} "
            f"cannot be reached ({reason}). What you can do:\n"
            f"  a folder: {setting}=/path/to/{last}, with {', '.join(files[:-1])} and {files[-1]}\n"
            "  a mirror: HF_ENDPOINT=https://hf-mirror.com (or another) before the command\n"
            f"  ModelScope: pip install modelscope; modelscope download --model {there} --local_dir models/{last} "
            f"(some names differ there), then {setting}=models/{last}"
        )
    if not huggingface_hub.is_offline_mode():
        logger.warning(f"the hub {constants.ENDPOINT} cannot be reached ({reason}); taking {name} from the cache")
        constants.HF_HUB_OFFLINE = True


@functools.cache
def silence_of(endpoint: str) -> str:
    """Reason why a hub gives no answer; empty if it gives one, even a refusal."""
    patience = constants.HF_HUB_ETAG_TIMEOUT if os.environ.get("HF_HUB_ETAG_TIMEOUT") else PATIENCE
    reasons = [f"no answer within {patience} s"]

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(endpoint, timeout=patience)
        except Exception as error:  # of the network, a proxy, a certificate, a malformed address
            reasons.append(f"{type(error).__name__}: {error}")
        else:
            reasons.append("")

    asking = Thread(target=ask, daemon=True)  # looking up a name has no timeout of its own
    asking.start()
    asking.join(patience)
    return reasons[-1]
