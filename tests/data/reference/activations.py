"""Makes qwen3-relu2: a tiny random Qwen3 gated by ReLU², and what transformers computes with it.

    pip install torch transformers==5.24
    python tests/data/reference/activations.py

reference.safetensors holds tokens, logits, loss, gradients by name, and the greedy continuation of the first eight
tokens.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

PROMPT, LENGTH = 8, 32
folder = Path(__file__).parent / "qwen3-relu2"
config = Qwen3Config(
    vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.08, pad_token_id=None,
    bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5, tie_word_embeddings=True, hidden_act="relu2",
)  # fmt: skip

torch.manual_seed(1)
model = AutoModelForCausalLM.from_config(config)
for name, parameter in model.named_parameters():
    if "norm" in name:
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
model.save_pretrained(folder)
(folder / "generation_config.json").unlink(missing_ok=True)

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
tokens = torch.randint(0, config.vocab_size, (1, LENGTH))
out = model(input_ids=tokens, labels=tokens)
out.loss.backward()
reference = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
with torch.no_grad():
    greedy = tokens[:, :PROMPT]
    while greedy.shape[1] < LENGTH:
        logits = model(input_ids=greedy, use_cache=False).logits
        greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], dim=1)
reference |= {"tokens": tokens[0], "logits": out.logits[0].detach(), "greedy": greedy[0]}
reference["loss"] = out.loss.detach().reshape(1)
save_file({key: value.contiguous() for key, value in reference.items()}, folder / "reference.safetensors")
weights = load_file(folder / "model.safetensors")
save_file(weights, folder / "model.safetensors", {"format": "pt"})
