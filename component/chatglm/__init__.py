"""ChatGLM2 and ChatGLM3 as native transformers classes. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

from .configuration_chatglm import ChatGLMConfig
from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from .tokenization_chatglm import ChatGLMTokenizer

AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
# The official config.json maps AutoModel to the class with the head, so its snippet may use either.
AutoModel.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
# By class name, not by AutoTokenizer.register: with trust_remote_code=True, transformers (5.17 to 5.24) prefers a
# folder's own Python to a tokenizer that is registered for a configuration, but not to one registered by name.
REGISTERED_TOKENIZER_CLASSES[ChatGLMTokenizer.__name__] = ChatGLMTokenizer

__all__ = ["ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMTokenizer"]
