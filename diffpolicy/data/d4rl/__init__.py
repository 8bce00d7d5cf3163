"""D4RL's datasets without the d4rl package: catalogue, files, transforms and D4RL's own views.

- ``catalogue``: the 155 dataset ids with file names, step limits, reference scores and sizes;
- ``location``: where a dataset's file is looked for;
- ``file``: :class:`~diffpolicy.data.d4rl.file.D4RLFile`, a lazy reader of whole episodes;
- ``transforms``: named changes of rewards and episodes, recorded with everything made of them;
- ``views``: what D4RL's ``qlearning_dataset`` and ``sequence_dataset`` return.
"""
