# SPDX-License-Identifier: Apache-2.0
"""Ground truth, losses and the training loop; ``docs/training.md`` tells how to use them.

``config`` and ``config_file`` (what a run is), ``data`` and ``batches`` (which pairs), ``supervision`` (true matches),
``objective``, ``end_to_end`` and ``expected_reward`` (losses), ``trainer`` (a step over all processes), ``loop``
(a run), ``checkpoints``.
All but ``supervision``, ``objective``, ``end_to_end`` and ``expected_reward`` need the extra ``train``.
"""
