"""What windows and transitions ask of a store, of arrays in memory: a zarr store takes a while."""

import numpy as np

from diffpolicy.data import FieldSpec


class ArrayStore:
    name = "<arrays>"

    def __init__(self, arrays, episode_ends):
        self._arrays, self.episode_ends = arrays, np.asarray(episode_ends)
        self.fields = {k: FieldSpec(v.shape[1:], str(v.dtype)) for k, v in arrays.items()}
        self.episode_lengths = np.diff(self.episode_ends, prepend=0)
        self.num_episodes, self.num_steps = len(self.episode_ends), int(self.episode_ends[-1])

    def read(self, field, start=0, stop=None):
        return self._arrays[field][start:stop]

    def episode(self, index):
        stop = self.episode_ends[index]
        return {k: v[stop - self.episode_lengths[index] : stop] for k, v in self._arrays.items()}

    def chunk_rows(self, field):
        return 4
