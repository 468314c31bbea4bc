//! What a checkpoint may cost, whatever engine takes it.

/// Of a guest that does nothing, in a second.
pub const IDLE_BYTES: u64 = 100 << 10;
/// The share of what is stored that is not the guest's own changed pages, where changes are many.
pub const OVERHEAD: f64 = 1.05;
pub const MANY_BYTES: u64 = 4 << 20;
/// The clock of a stopped VM is stopped, too; otherwise its seconds are a change of the device
/// state.
pub const TIMELESS: &[&str] = &["-rtc", "clock=vm"];
