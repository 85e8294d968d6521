"""Run an ONNX file on golden vectors, compare its outputs bit for bit: python check_vectors.py FILE.onnx VECTORS.npz"""

import sys

import numpy as np
import onnxruntime


def main(file: str, vectors: str) -> int:
    """Return 0 where every output has the bits of the trained model, else 1."""
    try:  # a file may say anything: no pickles, no more memory than it has bytes
        with open(vectors, "rb") as raw, np.load(raw, allow_pickle=False) as found:
            parts = found.zip.infolist()
            if any(p.compress_type for p in parts) or sum(p.file_size for p in parts) > raw.seek(0, 2):
                raise ValueError("its arrays are compressed, or larger than the file")
            golden = {name: np.asarray(found[name]) for name in found.files}
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [x.name for x in session.get_inputs()]  # found by name, else in order
        if not (named := all(f"input/{n}" in golden for n in names)) and f"input/{len(names) - 1}" not in golden:
            sys.exit(f"{vectors} has no inputs for {', '.join(names)} of {file}: it is of another model")
        feeds = {n: golden[f"input/{n}" if named else f"input/{i}"] for i, n in enumerate(names)}
        outputs = [np.asarray(y) for y in session.run(None, feeds)]
    except Exception as error:  # noqa: BLE001  (NumPy and ONNX Runtime raise many kinds)
        sys.exit(f"{vectors} or {file} is damaged, or of another model: {error or type(error).__name__}")
    wrong = int(len(outputs) != sum(name.startswith("output/") for name in golden))
    for i, got in enumerate(outputs):
        want = golden.get(f"output/{i}", np.zeros(0, "S1"))
        equal = got.shape == want.shape and got.dtype == want.dtype and got.tobytes() == want.tobytes()
        print(f"output {i}: {'equal, bit for bit' if equal else 'DIFFERENT'}")
        wrong |= not equal
    return wrong


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 3 else __doc__)
