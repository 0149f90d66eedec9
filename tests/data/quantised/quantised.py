"""Writes the folders beside it: a tiny random model, the same in four bits by transformers and
bitsandbytes, and the logits that these give.

    pip install torch transformers bitsandbytes accelerate safetensors
    python tests/data/quantised/quantised.py

Widths are multiples of 64: where a row is not a whole number of blocks, bitsandbytes 0.50's CPU path
dequantises other values than its codes and scales say.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
TOKENS = [1, 7, 30, 42, 42, 0, 31, 5, 17, 20, 11, 3]


def keep(model, folder):
    """config.json and the weights, nothing else."""
    written = Path(tempfile.mkdtemp())
    model.save_pretrained(written)
    folder.mkdir(exist_ok=True)
    for name in ["config.json", "model.safetensors"]:
        shutil.copy(written / name, folder / name)
    shutil.rmtree(written)


torch.manual_seed(7)
config = LlamaConfig(vocab_size=48, hidden_size=64, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.08,
                     tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
keep(LlamaForCausalLM(config), HERE / "dense")
for kind, double in [("nf4", True), ("fp4", False)]:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
                                bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(HERE / "dense", quantization_config=config, dtype=torch.float32,
                                                 device_map={"": "cpu"}, attn_implementation="eager")
    # With gradients: without, bitsandbytes repacks weights for another kernel.
    logits = model(torch.tensor([TOKENS])).logits[0].detach().float().contiguous()
    keep(model, HERE / kind)
    save_file({"tokens": torch.tensor(TOKENS), "logits": logits}, HERE / kind / "reference.safetensors")
