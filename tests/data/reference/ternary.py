"""Makes llama-ternary and bitnet: tiny random models with ternary weights, and what transformers computes with them.

    pip install torch transformers==5.23 accelerate
    TORCH_COMPILE_DISABLE=1 python tests/data/reference/ternary.py

reference.safetensors holds tokens, logits, loss, gradients by name (straight through both roundings), and the greedy
continuation of the first eight tokens. The seeds are the first at which no activation lies so near to a tie that
another order of f32 sums would round it to the other side.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitNetConfig, LlamaConfig
from transformers.utils.quantization_config import BitNetQuantConfig

SIZES = dict(
    vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.08, pad_token_id=None,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
QUANTIZATION = dict(linear_class="autobitlinear", quantization_mode="online", modules_to_not_convert=["lm_head"])
PROMPT, LENGTH = 8, 32
NEAREST_TIE = 3e-5


def distances_to_ties(model, tokens):
    """The smallest |x / s - (n + 1/2)| of what goes into the ternary layers."""
    nearest = []

    def observe(_, inputs):
        x = inputs[0].float()
        scaled = x * 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        nearest.append(((scaled - scaled.floor()) - 0.5).abs().min().item())

    layers = [m for m in model.modules() if type(m).__name__ == "AutoBitLinear"]
    hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return min(nearest)


def random_weights(config, seed):
    """Norms too, so that one left out or in the wrong place is seen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def make(name, config, seed=1):
    folder = Path(__file__).parent / name
    random_weights(config, seed).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = BitNetQuantConfig(**QUANTIZATION).to_dict()
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "AutoBitLinear"
    tokens = torch.randint(0, config.vocab_size, (1, LENGTH))
    if distances_to_ties(model, tokens) < NEAREST_TIE:
        return make(name, config, seed + 1)
    print(name, "seed", seed)
    model.train()
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    reference = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        greedy = tokens[:, :PROMPT]
        while greedy.shape[1] < LENGTH:
            logits = model(input_ids=greedy, use_cache=False).logits
            greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], dim=1)
    reference |= {"tokens": tokens[0], "logits": out.logits[0].detach(), "greedy": greedy[0]}
    reference["loss"] = out.loss.detach().reshape(1)
    reference = {key: value.contiguous() for key, value in reference.items()}
    save_file(reference, folder / "reference.safetensors")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


make("llama-ternary", LlamaConfig(**SIZES, rms_norm_eps=1e-5, tie_word_embeddings=False))
make("bitnet", BitNetConfig(**SIZES, rms_norm_eps=1e-5, tie_word_embeddings=True))
