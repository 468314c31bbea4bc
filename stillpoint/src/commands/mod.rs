//! The commands: each turns its arguments into a request, lets the engine or the helper do it, and
//! prints what came of it.

pub(crate) mod adopt;
pub(crate) mod attach;
pub(crate) mod bench;
pub(crate) mod checkpoint;
pub(crate) mod doctor;
pub(crate) mod inspect;
pub(crate) mod prove;
pub(crate) mod restore;
pub(crate) mod rollback;
pub(crate) mod run;
pub(crate) mod status;
pub(crate) mod supervise;
pub(crate) mod verify;
