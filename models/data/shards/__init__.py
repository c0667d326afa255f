"""Shards: tar files of samples in webdataset's format, written, indexed and read at any place.

python -m models.data.shards write captions.csv shards
python -m models.data.shards index "shards/train-{00000..00012}.tar"
"""
