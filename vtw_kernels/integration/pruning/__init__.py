"""Visual pruning (YOPO): what is pruned (``visual_pruning.py``), one forward (``prune.py``) and what runs in its layers
(``layer.py``), the cache, the grids of images, and windows over them."""
