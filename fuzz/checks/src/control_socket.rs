//! A line on the control socket, either way.

use helper::control::{Reply, Request};
use vm::error::EngineError;

/// Reads `input` as what a command asks and as what a helper answers; whether it is one of them.
pub(crate) fn check(input: &[u8]) -> bool {
    let Ok(line) = std::str::from_utf8(input) else { return false };
    let request = Request::parse(line).map(|request| {
        let written = serde_json::to_string(&request).expect("a request");
        assert_eq!(Request::parse(&written).expect("ours"), request);
    });
    let reply = Reply::parse(line).map(|reply| {
        let written = serde_json::to_string(&reply).expect("a reply");
        let again = Reply::parse(&written).expect("ours");
        assert_eq!(std::mem::discriminant(&again), std::mem::discriminant(&reply));
        if let Reply::Failed(failure) = again {
            let code = EngineError::from(failure).class().exit_code();
            assert!((1..=5).contains(&code), "exit code {code}");
        }
    });
    request.is_ok() || reply.is_ok()
}
