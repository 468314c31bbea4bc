//! What the boot sector (`scribbler.S`) has written after so many writes: memory is a function of
//! one register, so that a VM checkpointed while it ran can be compared byte for byte, too.

use crate::qmp::QmpClient;
use crate::recipe::SCRIBBLER_RAM_BYTES;

/// Where it writes.
const FROM: usize = 1 << 20;
const UNTIL: usize = 0xF0_0000;
const LAST_START: u32 = 0xEF_F000;
/// Some thousand writes a second; a test that runs for hours is none of ours.
const MAX_WRITES: u64 = 1 << 28;

/// The guest's memory, replayed.
#[derive(Clone)]
pub struct Scribbles {
    register: u32,
    writes: u64,
    memory: Vec<u8>,
}

impl Scribbles {
    /// Memory in which nothing is written yet.
    pub fn new(seed: u32) -> Self {
        Self { register: seed, writes: 0, memory: vec![0; SCRIBBLER_RAM_BYTES as usize] }
    }

    fn write(&mut self) {
        self.writes += 1;
        self.register = self.register.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let place = (self.register >> 8) & 0xFF_FFFC;
        if !(FROM as u32..LAST_START).contains(&place) {
            return;
        }
        if self.register & 0x1F == 0 {
            let page = (place & 0xFF_F000) as usize;
            self.memory[page..page + 4096].fill(0);
        } else {
            self.memory[place as usize..place as usize + 4]
                .copy_from_slice(&self.register.to_le_bytes());
        }
    }

    /// Continues the writes until the register is `register`.
    pub fn replay(&mut self, register: u32) {
        let end = self.writes + MAX_WRITES;
        while self.register != register {
            assert!(self.writes < end, "the guest's register never was {register:#x}");
            self.write();
        }
    }

    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Pages of a stopped VM's memory that are not what its register says.
    pub fn differences(mut self, monitor: &mut QmpClient) -> Vec<usize> {
        self.replay(register(monitor));
        let memory = monitor.memory(SCRIBBLER_RAM_BYTES);
        let pages = (FROM..UNTIL).step_by(4096);
        pages
            .filter(|at| memory[*at..at + 4096] != self.memory[*at..at + 4096])
            .map(|at| at / 4096)
            .collect()
    }
}

/// The register of the stopped guest, where it waits for its next tick. In the middle of a tick,
/// which lasts microseconds of each 55 ms, a write may be half done.
fn register(monitor: &mut QmpClient) -> u32 {
    let all = monitor.human("info registers");
    let word = all.split_whitespace().find_map(|word| word.strip_prefix("EBX="));
    u32::from_str_radix(word.unwrap_or_else(|| panic!("no EBX in {all}")), 16).expect("a number")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn writes_depend_on_the_seed_alone() {
        let mut one = Scribbles::new(7);
        (0..1000).for_each(|_| one.write());
        let mut other = Scribbles::new(7);
        other.replay(one.register);
        assert!(other.writes() == 1000 && other.memory == one.memory);
        let mut another = Scribbles::new(8);
        (0..1000).for_each(|_| another.write());
        assert!(another.memory != one.memory && one.memory[..FROM].iter().all(|byte| *byte == 0));
    }
}
