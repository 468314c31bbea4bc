//! The commands: each turns its arguments into a request, lets the engine or the helper do it, and
//! prints what came of it.

pub mod adopt;
pub mod attach;
pub mod bench;
pub mod checkpoint;
pub mod doctor;
pub mod inspect;
pub mod prove;
pub mod restore;
pub mod run;
pub mod verify;
