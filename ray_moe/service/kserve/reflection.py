"""Descriptors for server reflection, which looks into one pool, where ours and the protocol's are in two."""

from __future__ import annotations

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool


def pool_of(*files: FileDescriptor) -> DescriptorPool:
    """A pool of copies of these files and of all that they import."""
    pool = DescriptorPool()
    added: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name in added:
            return
        added.add(file.name)
        for dependency in file.dependencies:
            add(dependency)
        pool.AddSerializedFile(file.serialized_pb)

    for file in files:
        add(file)
    return pool
