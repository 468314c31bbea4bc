//! What the plugin inside QEMU and the tracker must agree on: the bytes of their greeting
//! ([`wire`]), the kernel's userfaultfd interface ([`uapi`]), and how a process gets a userfaultfd
//! ([`uffd`]: the plugin to hand it over, the tracker's host check to report whether the plugin
//! will get one).

pub mod uapi;
pub mod uffd;
pub mod wire;
