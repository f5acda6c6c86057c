"""Other implementations of Mamba, each behind the same few functions: one file a peer.

A function here takes our module or our inputs and returns the peer's, holding the same numbers. It raises ImportError
where the peer is not installed or does not serve the device.
"""
