//! A name that no other process has.

use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

const MAX_UUID_LINE: u64 = 64;

/// A fresh name of letters, digits and '-', unique over hosts: the kernel's random UUID, or (where
/// /proc is not mounted) time, process and a counter.
pub(crate) fn nonce() -> String {
    match kernel_uuid() {
        Ok(uuid) => uuid.trim().to_owned(),
        Err(_) => fallback(),
    }
}

fn kernel_uuid() -> std::io::Result<String> {
    let mut uuid = String::new();
    File::open("/proc/sys/kernel/random/uuid")?.take(MAX_UUID_LINE).read_to_string(&mut uuid)?;
    Ok(uuid)
}

fn fallback() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{:x}-{:x}-{count:x}", time.as_nanos(), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_the_same() {
        assert_ne!(nonce(), nonce());
        assert_ne!(fallback(), fallback());
        assert!(crate::path::is_visible(&nonce()));
    }
}
