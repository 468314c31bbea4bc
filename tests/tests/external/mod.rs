//! VMs that nobody prepared: plain QEMUs of the shapes that people use, attached by their monitor,
//! checkpointed by QEMU's own migration stream under load, and brought back.
//!
//! Here each shape takes 4 checkpoints, of which 2 are restored. Before a release run them with 20
//! checkpoints each, of which every fifth is restored:
//!
//! ```text
//! STILLPOINT_TEST_THOROUGH=1 cargo test -p stillpoint-tests unprepared::layouts
//! ```

mod bytes;
mod layouts;
mod manners;
mod sizes;

/// What the helper may hold, as docs/limits.md says.
fn memory_limit(ram_bytes: u64) -> u64 {
    (64 << 20) + (256 << 20) + 20 * (ram_bytes / 4096)
}
