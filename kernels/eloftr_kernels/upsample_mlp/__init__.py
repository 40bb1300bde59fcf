# SPDX-License-Identifier: Apache-2.0
"""Message upsampling and MLP: ``op.py`` holds the public function, ``naive.py`` the formula."""
