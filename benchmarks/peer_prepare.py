"""Makes what the peers read from one GGUF file, so that all run the same weights. Runs under the peers' interpreter.

python peer_prepare.py snapshot MODEL.gguf OUT_DIR      a Hugging Face directory, float32
python peer_prepare.py gguf     MODEL.gguf OUT.gguf TYPE    the same model in another GGUF type, such as Q8_0
python peer_prepare.py onnx     SNAPSHOT OUT_DIR PRECISION  onnxruntime-genai's own builder
"""

import subprocess
import sys
from pathlib import Path


def snapshot(source, out):
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    how = {"gguf_file": source.name}
    if hasattr(transformers, "GgufConfig"):  # where it is not, GGUF weights are always unpacked
        how["quantization_config"] = transformers.GgufConfig(gguf_file=source.name, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **how)
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)


def gguf(source, out, type_name):
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    wanted = GGMLQuantizationType[type_name]
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type)
    writer.add_file_type(LlamaFileType["ALL_F32" if type_name == "F32" else f"MOSTLY_{type_name}"])
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        else:
            head = type_name.startswith("Q4") and tensor.name in ("token_embd.weight", "output.weight")
            to = GGMLQuantizationType.Q8_0 if head else wanted  # as llama.cpp's own quantizer has it for such a width
            writer.add_tensor(tensor.name, quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def onnx(source, out, precision):
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += [
        "-m",
        "model",
        "-i",
        str(source),
        "-o",
        str(out),
        "-p",
        precision,
        "-e",
        "cpu",
        "-c",
        str(out) + ".cache",
    ]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    what, source, out, *rest = sys.argv[1:]
    {"snapshot": snapshot, "gguf": gguf, "onnx": onnx}[what](Path(source), Path(out), *rest)
