"""The commands of ``python -m eval``, a module each: ``DESCRIPTION``, ``add_arguments(parser)``, ``run(args)``, which raises EvalError.

``args.ranks`` are the launcher's (``train.dist.Ranks``); a module that can use several says ``ON_RANKS = True``.
"""

COMMANDS = {  # name of the module -> what its line in --help says
    "pairs": "verification accuracy and TAR@FAR on a list of pairs (LFW, CFP, AgeDB)",
    "ijb": "IJB-B and IJB-C: 1:1 verification and 1:N identification of templates",
    "report": "a page that compares models: numbers, intervals, ROC, DET, histograms",
    "table": "the published figures, and yours in the same columns",
    "pack": "a folder of images and its pairs, or the field's .bin, as one safe file",
    "mfr": "the protocol of MFR-Ongoing on your own sets, and the check of a package for it",
    "release": "weights as a folder for others: safetensors, JSON, model card, checksums",
    "export": "weights as an ONNX graph, compared with torch before it appears",
}
