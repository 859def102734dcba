"""Reads and writes RecordIO files with MXNet itself, for ``test_mxnet.py``, which runs this file in the python that has MXNet.

MXNet 1.9.1 is the last release. It imports with NumPy up to 1.23 alone, so it needs a virtual environment of its own (Linux on x86-64):

    python3.11 -m venv ~/mxnet
    ~/mxnet/bin/pip install mxnet==1.9.1 numpy==1.23.5 opencv-python-headless==4.8.1.78
    MXNET_PYTHON=~/mxnet/bin/python python -m pytest -m oracle

A request is a line of JSON on stdin, ``{"do": name of a function below, its arguments}``; the answer is a line on stdout. Bytes are hex. A
record to write is ``{"key", "labels": number or list, "image", "id", "id2"}``. Nothing of the project is imported.
"""

import json
import os
import sys

import mxnet
import numpy
from mxnet.recordio import IRHeader, MXIndexedRecordIO, MXRecordIO, pack, pack_img, unpack


def about():
    """MXNet's version, and where its im2rec is."""
    return {"version": mxnet.__version__, "im2rec": os.path.join(os.path.dirname(mxnet.__file__), "tools", "im2rec.py")}


def read_in_order(rec):
    """All records from the first byte on, without the index."""
    reader, records = MXRecordIO(rec, "r"), []
    while (payload := reader.read()) is not None:
        records.append(_unpacked(payload))
    return records


def read_by_key(rec, idx, keys):
    reader = MXIndexedRecordIO(idx, rec, "r")
    return [_unpacked(reader.read_idx(key)) for key in keys]


def pack_all(records):
    return [_packed(record).hex() for record in records]


def write(rec, idx, records):
    writer = MXIndexedRecordIO(idx, rec, "w")
    for record in records:
        writer.write_idx(record["key"], _packed(record))
    writer.close()


def write_pixels(rec, idx, records, shape, encoding, quality):
    """``image`` holds uint8 pixels of ``shape`` (height, width, BGR) here, which MXNet encodes."""
    writer = MXIndexedRecordIO(idx, rec, "w")
    for record in records:
        pixels = numpy.frombuffer(bytes.fromhex(record["image"]), numpy.uint8).reshape(shape)
        header = IRHeader(0, record["labels"], record["id"], record["id2"])
        writer.write_idx(record["key"], pack_img(header, pixels, quality=quality, img_fmt=encoding))
    writer.close()


def _packed(record):
    return pack(IRHeader(0, record["labels"], record["id"], record["id2"]), bytes.fromhex(record["image"]))


def _unpacked(payload):
    header, image = unpack(payload)
    labels = header.label.tolist() if header.flag else header.label
    return {"flag": header.flag, "labels": labels, "id": header.id, "id2": header.id2, "image": image.hex()}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what MXNet prints must not come between the answers
    functions = {function.__name__: function for function in (about, read_in_order, read_by_key, pack_all, write, write_pixels)}
    for line in sys.stdin:
        request = json.loads(line)
        answer = functions[request.pop("do")](**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
