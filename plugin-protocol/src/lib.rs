//! What the plugin inside QEMU and the tracker must agree on: the bytes of their greeting
//! ([`wire`]), the kernel's userfaultfd interface ([`uapi`]), and how a process gets a userfaultfd
//! ([`uffd`]: the plugin to hand it over, the tracker's host check to report whether the plugin
//! will get one).
//!
//! # Example
//!
//! A client of another version gets a refusal that it can read:
//!
//! ```
//! use plugin_protocol::wire::{Hello, PROTOCOL_VERSION, Reply, Status};
//!
//! let hello = Hello { version: PROTOCOL_VERSION + 1 }.encode();
//! let refused = Hello::parse(&hello).err().map(Reply::refusal);
//! let reply = refused.as_ref().map(Reply::encode).and_then(|bytes| Reply::parse(&bytes));
//! assert_eq!(reply.map(|reply| reply.status), Some(Status::UnsupportedVersion));
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod uapi;
pub mod uffd;
pub mod wire;
