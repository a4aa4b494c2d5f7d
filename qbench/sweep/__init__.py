"""Many points: what a sweep expands to, where its points run, and what came of them.

It is built on what Hydra offers in public: a Sweeper (hydra_plugins/qbench_sweeper), OverridesParser, compose and
ConfigLoader.load_sweep_config. What is used besides, here and in request/, is private to the package that it comes
from, and nothing public does the same. tests/sweep/test_hydra.py checks all of it, with the versions it was read at.

| package | name | used in | for |
|---|---|---|---|
| hydra-core | `hydra._internal.utils.get_args_parser` | request/overrides.py | the flags of the command line |
| hydra-core | `Singleton.get_state`, `set_state` | request/explain.py | to compose once more within a run of Hydra's |
"""
