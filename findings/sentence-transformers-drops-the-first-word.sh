#!/usr/bin/env bash
# sentence-transformers 6.2.0 (Apache-2.0) with a byte-level BPE tokenizer (those of GPT-2, Llama 3, Qwen, ModernBERT): where
# Pooling has include_prompt=False, the tokens of the prompt are counted by encoding the prompt alone. Prompts end in a
# space ("query: "), which alone is a token of its own; before a word it belongs to the word's token. So one token too many
# is left out: the text's first word takes no part in the mean, and of a text of one word there remains the end token.
# Nothing is said. Whoever pools by the prompt's real length has other embeddings than the library that made the model.
#
# Seen: "query: " is 8 tokens with the one at the beginning, and "query: river" shares 7 with it. The embedding of "river"
# is the mean over the end token alone, that of "river mill" over "mill" and the end token; with the prompt "query:" and
# the space in the text both are the mean over all their words. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile sentence-transformers==6.2.0 transformers==5.24.0 torch==2.13.0 tokenizers==0.23.3
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, models as kinds, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

# A vocabulary of bytes and two words, each with the space before it.
vocabulary = ["[PAD]", "[CLS]", "[SEP]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
merges = []
for word in ("Ġriver", "Ġmill"):
    for end in range(2, len(word) + 1):
        merges.append((word[: end - 1], word[end - 1]))
        vocabulary.append(word[:end])
made = Tokenizer(kinds.BPE({token: number for number, token in enumerate(vocabulary)}, merges))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
tokenizer.save_pretrained("model")
torch.manual_seed(0)
base = LlamaModel(LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    max_position_embeddings=64,
)).eval()
base.save_pretrained("model")
library = SentenceTransformer(
    modules=[models.Transformer("model"), models.Pooling(32, "mean", include_prompt=False)], device="cpu"
)


def pooled(prompt, text):
    """The tokens over which the library's embedding is the mean: the end of the sequence that gives the same numbers."""
    found = torch.from_numpy(library.encode([text], prompt=prompt))[0]
    ids = tokenizer(prompt + text)["input_ids"]
    with torch.no_grad():
        hidden = base(torch.tensor([ids])).last_hidden_state[0]
    starts = [start for start in range(len(ids)) if torch.allclose(hidden[start:].mean(0), found, atol=1e-5)]
    tokens = [tokenizer.convert_ids_to_tokens(ids[start:]) for start in starts]
    print(f"prompt {prompt!r}, text {text!r}: the mean over {tokens}")
    return tokens


alone, whole = tokenizer("query: ")["input_ids"][:-1], tokenizer("query: river")["input_ids"]
shared = sum(a == b for a, b in zip(alone, whole))
print("tokens of the prompt alone:", len(alone), "shared with the prompt before a word:", shared)
assert (len(alone), shared) == (8, 7)
assert pooled("query: ", "river") == [["[SEP]"]]
assert pooled("query: ", "river mill") == [["Ġmill", "[SEP]"]]
assert pooled("query:", " river") == [["Ġriver", "[SEP]"]]
assert pooled("query:", " river mill") == [["Ġriver", "Ġmill", "[SEP]"]]
PY
