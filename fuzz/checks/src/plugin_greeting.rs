//! The greeting between the plugin in QEMU and the tracker, either way.

use plugin_protocol::wire::{HELLO_LEN, Hello, REPLY_LEN, Reply};

/// Where a reply's reserved bytes begin.
const RESERVED_AT: usize = 60;

/// Reads `input` as what a client says and as what the plugin answers; whether it is one of them.
pub(crate) fn check(input: &[u8]) -> bool {
    let is_hello = input.first_chunk::<HELLO_LEN>().is_some_and(hello);
    let is_reply = input.first_chunk::<REPLY_LEN>().is_some_and(reply);
    is_hello || is_reply
}

fn hello(bytes: &[u8; HELLO_LEN]) -> bool {
    match Hello::parse(bytes) {
        Ok(hello) => assert_eq!(hello.encode()[..12], bytes[..12]),
        Err(status) => {
            let refusal = Reply::refusal(status);
            assert_eq!(Reply::parse(&refusal.encode()), Some(refusal));
            return false;
        }
    }
    true
}

fn reply(bytes: &[u8; REPLY_LEN]) -> bool {
    let Some(reply) = Reply::parse(bytes) else { return false };
    let written = reply.encode();
    assert_eq!(written[..RESERVED_AT], bytes[..RESERVED_AT], "nothing is lost");
    assert_eq!(Reply::parse(&written), Some(reply));
    true
}
