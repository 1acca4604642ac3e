"""The main job on a real model: `minipeft demo`."""
