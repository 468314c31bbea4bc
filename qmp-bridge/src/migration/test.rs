//! Sessions against a scripted peer.
