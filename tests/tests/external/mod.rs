//! External VMs: QEMUs of the shapes that users run, attached by their monitor, checkpointed by
//! QEMU's own migration stream under load, and restored.
//!
//! Here each shape takes 4 checkpoints, of which 2 are restored. Before a release run them with 20
//! checkpoints each, of which every fifth is restored:
//!
//! ```text
//! STILLPOINT_TEST_THOROUGH=1 cargo test -p stillpoint-tests external::layouts
//! ```

mod bytes;
mod layouts;
mod manners;
mod sizes;

/// What the helper may hold, as docs/limits.md says.
fn memory_limit(ram_bytes: u64) -> u64 {
    (64 << 20) + (256 << 20) + 20 * (ram_bytes / 4096)
}
