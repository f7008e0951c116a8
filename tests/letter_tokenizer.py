"""A tokenizer of single characters, and a chat template for it."""

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def letters(*, template=None, begin=True, end=True, merges=(), metaspace=False) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters for a language model."""
    characters = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *[chr(n) for n in range(32, 127)], "\n", "\u2581"]
    vocab = {token: n for n, token in enumerate([*characters, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(BPE(vocab, list(merges)))
    tokenizer.decoder = Fuse()
    if metaspace:
        # As Llama 2: a space is a sign of its own, and stands before every text.
        parts = {"prepend_scheme": "first"}
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False, **parts)
        tokenizer.decoder = decoders.Metaspace(**parts)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in characters[:4]])
    if begin:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if end else {})
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = template
    return made
