"""The example package is installed and run by test_plugins.py, in processes of its own; it is none of this one's."""

collect_ignore = ["llmd_example_plugins"]
