"""What an engine has to know of a model's files, worked out and checked on the owner's station.

seal.py puts it into the container as model.json; the engine only reads it. Its fields: tensors:
[[name, dtype, shape, file, start in it, size in bytes]], dtype as in safetensors. context: tokens
beyond which the model must not be used although its config goes on, or null. ends: ids that end an
answer. sampling: temperature, top_p, top_k and repetition_penalty where a request says nothing.
"""

import json
import math

import muprotocol as mp

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
ITEM_SIZES = dict.fromkeys("U8 I8 BOOL F8_E4M3 F8_E5M2".split(), 1)  # bytes
ITEM_SIZES |= dict.fromkeys("U16 I16 F16 BF16".split(), 2)
ITEM_SIZES |= dict.fromkeys("U32 I32 F32".split(), 4)
ITEM_SIZES |= dict.fromkeys("I64 F64".split(), 8)
FLOATS = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}  # a config's dtype: bytes


def safetensors_entries(data):
    """[(name, dtype, shape, start, size in bytes)] of a safetensors file, every bound checked.

    Form: 8-byte little-endian header length, JSON header, data; the spans are contiguous from the
    header's end to the file's, each as long as shape x dtype. Raises ValueError.
    """
    is_size = mp.is_integer(0, 1 << 50)
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(100 << 20, len(data) - 8):
        raise ValueError("a safetensors header has a wrong length")
    header = json.loads(bytes(data[8 : 8 + length]).decode(), object_pairs_hook=unique_keys)
    header.pop("__metadata__", None)
    entries, end = [], 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        if not all(map(is_size, [*shape, start, stop])) or entry["dtype"] not in ITEM_SIZES:
            raise ValueError(f"{name}: shape or dtype is not valid")
        if start != end or stop - start != math.prod(shape) * ITEM_SIZES[entry["dtype"]]:
            raise ValueError(f"{name}: offsets do not fit")
        entries.append((name, entry["dtype"], shape, 8 + length + start, stop - start))
        end = stop
    if 8 + length + end != len(data):
        raise ValueError("a safetensors file has a wrong length")
    return entries


def unique_keys(pairs):
    """An object's dict, for json. Raises ValueError for a key that comes twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def make_facts(tensors, config, generation):
    """model.json, as an object. Raises ValueError, whose text names the file.

    tensors: as above. config, generation: config.json and generation_config.json, {} for none.
    """
    check_types(tensors, config)
    ends = generation.get("eos_token_id")
    ends = config.get("eos_token_id") if ends is None else ends
    ends = ends if isinstance(ends, list) else [ends]
    if not ends or not all(map(mp.is_integer(0, 1 << 24), ends)):
        raise ValueError("config.json: no eos_token_id says which token ends an answer")
    facts = {"tensors": tensors, "context": longrope_context(config), "ends": ends}
    return facts | {"sampling": sampling_defaults(generation)}


def check_types(tensors, config):
    """Raise ValueError for a tensor that the engine would have to widen to the config's type:
    weights are in memory as they are stored, or not at all.
    """
    floats = [(name, dtype) for name, dtype, *_ in tensors if "F" in dtype]
    said = config.get("dtype") or config.get("torch_dtype")
    if not floats or said not in (None, *FLOATS):
        return  # the engine refuses a type that it does not know
    wanted = FLOATS[said] if said else ITEM_SIZES[floats[0][1]]
    narrow = next((name for name, dtype in floats if ITEM_SIZES[dtype] < wanted), None)
    if narrow is not None:
        kind = said or floats[0][1]
        raise ValueError(f"{narrow}: it would not stay as it is stored, in a model of {kind}")


def sampling_defaults(generation):
    """What generation_config.json says of sampling; nothing means the likeliest token always."""
    said = {name: generation[name] for name in NEUTRAL if generation.get(name) is not None}
    for name, value in said.items():
        if not mp.SAMPLING[f"{name}?"](value):
            raise ValueError(f"generation_config.json: its {name} is out of range")
    return NEUTRAL | said | ({} if generation.get("do_sample") else {"temperature": 0.0})


def longrope_context(config):
    """The context before longrope's other factors begin: past it a stream in a batch would change
    its neighbours' positions. None for any other rope. ValueError.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    name = "original_max_position_embeddings"
    context = rope.get(name) or config.get(name)
    if not mp.is_integer(1, 1 << 30)(context):
        raise ValueError(f"config.json: its rope has no {name}")
    return context
