"""What each chip cannot do. A tag marks the tests that need a capability; a chip that lacks it lists the tag here with
the reason, and its tests are skipped. EXPECTED_FAILURES names single tests that fail today. Both lists must stay true:
a capability that is there although listed as missing, or a test that passes although expected to fail, is a failure.
"""

from hal_abi import GRAPH

# tag -> does this table offer the capability?
TAGS = {
    "priorities": lambda hal: hal.has("stream_priority_range"),
    "peer": lambda hal: hal.has("can_access_peer") and hal.has("enable_peer"),
    "graph": lambda hal: GRAPH in hal.extensions(),
    "pinned": lambda hal: hal.has("host_malloc") and hal.has("host_free"),
    "alias": lambda hal: hal.has("host_alias"),
    "copy2d": lambda hal: hal.has("copy2d_async"),
    "host_func": lambda hal: hal.has("stream_host_func"),
    # Not visible in the table: the chip finds stale and foreign handles, and ranges outside a block.
    "handles": None,
    "ranges": None,
}

UNSUPPORTED = {
    "host": {
        "graph": "the simulated device has no graph extension",
    },
    "template": {
        "priorities": "the skeleton's streams are all alike",
        "peer": "it has one device",
        "graph": "no extension",
        "alias": "left out to exercise the default",
        "copy2d": "left out to exercise the default",
        "host_func": "left out to exercise the default",
        "handles": "its handles are plain pointers",
        "ranges": "it does not check device ranges",
    },
    "cuda": {
        "graph": "the extension is not written yet",
        "alias": "the host cannot read CUDA device memory",
        "ranges": "the CUDA runtime does not check device ranges of asynchronous copies",
    },
}

# (chip, test function) -> reason
EXPECTED_FAILURES = {}
