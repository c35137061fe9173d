"""Whether a model that is no folder can be had, asked once and answered in seconds."""

import functools
import os
from threading import Thread

import huggingface_hub
from huggingface_hub import constants
from loguru import logger

from .errors import ArgumentError

PATIENCE = 5  # seconds, unless HF_HUB_ETAG_TIMEOUT says otherwise


def require_hub_or_cache(name: str) -> None:
    """See that a hub's model is in the cache or the hub answers, which its library would find out in minutes.

    Where the hub does not answer, the cache is used without asking again.

    Raises:
        ArgumentError: neither; with the ways on.
    """
    reason = "HF_HUB_OFFLINE is set" if huggingface_hub.is_offline_mode() else silence_of(constants.ENDPOINT)
    if not reason:
        return
    if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        last = name.rpartition("/")[2]
        raise ArgumentError(
            f"model {name!r} is no folder in {os.getcwd()} and not in the cache, and the hub {constants.ENDPOINT} "
            f"cannot be reached ({reason}). Ways on:\n"
            f"  a folder: model_name_or_path=/path/to/{last}, with config.json, the tokenizer and *.safetensors\n"
            "  a mirror: HF_ENDPOINT=https://hf-mirror.com (or another) before the command\n"
            f"  ModelScope: pip install modelscope; modelscope download --model {name} --local_dir models/{last} (some "
            f"names differ there), then model_name_or_path=models/{last}"
        )
    if not huggingface_hub.is_offline_mode():
        logger.warning(f"the hub {constants.ENDPOINT} cannot be reached ({reason}); taking {name} from the cache")
        constants.HF_HUB_OFFLINE = True


@functools.cache
def silence_of(endpoint: str) -> str:
    """Why a hub gives no answer at all; empty where it gives one, were it a refusal."""
    patience = constants.HF_HUB_ETAG_TIMEOUT if os.environ.get("HF_HUB_ETAG_TIMEOUT") else PATIENCE
    reasons = [f"no answer within {patience} s"]

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(endpoint, timeout=patience)
        except Exception as error:  # of the network, a proxy, a certificate, an address that is none
            reasons.append(f"{type(error).__name__}: {error}")
        else:
            reasons.append("")

    asking = Thread(target=ask, daemon=True)  # looking up a name has no timeout of its own
    asking.start()
    asking.join(patience)
    return reasons[-1]
