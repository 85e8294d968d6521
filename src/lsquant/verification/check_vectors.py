"""Run an ONNX file on golden vectors, compare its outputs bit for bit: python check_vectors.py FILE.onnx VECTORS.npz"""

import os
import sys
import zipfile

import numpy as np
import onnxruntime


def arrays(vectors: str) -> dict[str, np.ndarray]:
    """Read the arrays: numbers and names, never objects, and no more of them than the file has bytes."""
    try:
        with zipfile.ZipFile(vectors) as file:
            sizes = [max(part.file_size, part.compress_size) for part in file.infolist()]
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise ValueError("an array is compressed, which export_vectors does not do")
            if sum(sizes) > os.path.getsize(vectors):
                raise ValueError("its arrays are larger than the file")
        with np.load(vectors, allow_pickle=False) as found:
            golden = {name: np.asarray(found[name]) for name in found.files}
        if odd := [name for name, value in golden.items() if value.dtype.kind not in "biufU"]:
            raise ValueError(f"{odd[0]!r} holds no numbers")
        return golden
    except Exception as error:  # noqa: BLE001  (zipfile's and NumPy's readers raise many kinds)
        sys.exit(f"{vectors} is damaged or not of export_vectors: {error or type(error).__name__}")


def main(file: str, vectors: str) -> int:
    """0 where every output has the bits of the trained model, else 1."""
    golden = arrays(vectors)
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  (its own kinds, which derive from Exception)
        sys.exit(f"ONNX Runtime refuses {file}: {error}")
    names = [x.name for x in session.get_inputs()]  # found by name, else in order
    numbered = all(f"input/{i}" in golden for i in range(len(names)))
    if not (named := all(f"input/{n}" in golden for n in names)) and not numbered:
        sys.exit(f"{vectors} has no inputs for {', '.join(names)} of {file}: it is of another model")
    feeds = {n: golden[f"input/{n}" if named else f"input/{i}"] for i, n in enumerate(names)}
    try:
        outputs = [np.asarray(y) for y in session.run(None, feeds)]
    except Exception as error:  # noqa: BLE001
        sys.exit(f"ONNX Runtime cannot run {file} on the inputs of {vectors}: {error}")
    wrong = int(len(outputs) != sum(name.startswith("output/") for name in golden))
    for i, got in enumerate(outputs):
        want = golden.get(f"output/{i}")
        equal = want is not None and (got.shape, got.dtype) == (want.shape, want.dtype)
        equal = equal and got.tobytes() == want.tobytes()
        print(f"output {i}: {'equal, bit for bit' if equal else 'DIFFERENT'}")
        wrong |= not equal
    return wrong


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 3 else __doc__)
