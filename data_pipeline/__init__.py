"""Files to batches: RecordIO shards, the packer and its checks, synthetic faces, and the resumable DALI loader."""

SIDE = 112  # pixels, height and width of every image
