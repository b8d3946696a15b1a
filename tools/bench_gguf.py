"""Write a Llama of a Hugging Face directory as a GGUF file, for tools/bench.py's llama.cpp.

    bench_gguf.py MODEL_DIR OUT.gguf      in a virtual environment that has gguf, torch, safetensors

Matrices as bf16, as they are; vectors as fp32. llama.cpp turns pairs of neighbours where
transformers turns the two halves of a head, so the rows of queries and keys are put in its order.
"""

import json
import pathlib
import sys

import gguf
import torch
from safetensors.torch import load_file

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}


def interleave(weight, heads):
    """Rows of each head from two halves to pairs of neighbours."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def add_facts(writer, config):
    """The numbers of the architecture."""
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_tokenizer(writer, folder, config):
    """The byte-level BPE tokenizer and the chat template."""
    fields = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    special = {token["id"]: token["content"] for token in fields["added_tokens"]}
    names = {number: text for text, number in fields["model"]["vocab"].items()} | special
    count = config["vocab_size"]
    tokens = [names.get(number, f"[unused{number}]") for number in range(count)]
    kinds = [gguf.TokenType.NORMAL if n in names else gguf.TokenType.UNUSED for n in range(count)]
    for number in special:
        kinds[number] = gguf.TokenType.CONTROL
    merges = [m if isinstance(m, str) else " ".join(m) for m in fields["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)  # the template has it
    writer.add_chat_template((folder / "chat_template.jinja").read_text("utf-8"))


def add_tensors(writer, folder, config):
    """All tensors, under llama.cpp's names."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            place = WHOLE.get(name)
            if place is None:
                _, _, layer, part = name.removesuffix(".weight").split(".", 3)
                place = f"blk.{layer}.{NAMES[part]}.weight"
                if NAMES[part] in heads:
                    tensor = interleave(tensor, heads[NAMES[part]])
            if tensor.ndim == 1:
                writer.add_tensor(place, tensor.float().numpy())
                continue
            data = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(place, data, raw_dtype=gguf.GGMLQuantizationType.BF16)


def main():
    """Convert."""
    folder, out = map(pathlib.Path, sys.argv[1:])
    config = json.loads((folder / "config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(out, "llama")
    add_facts(writer, config)
    add_tokenizer(writer, folder, config)
    add_tensors(writer, folder, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
