//! Feeds the stream reader with anything.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

/// The end of a sound stream: end mark, mark of a description, its length, its first byte.
const LENGTH_AT: usize = 2;
const TEXT_AT: usize = LENGTH_AT + 4;

fuzz_target!(|data: &[u8]| {
    fuzz_checks::check("stream_reader", data);
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    if seed % 4 != 0 {
        correct_length(&mut data[..size]);
    }
    size
});

/// The length of the description is the one number that must fit everything before and behind it;
/// random mutations do not find it.
fn correct_length(data: &mut [u8]) {
    let begins = |window: &[u8]| window[..LENGTH_AT] == [0, 6] && window[TEXT_AT] == b'{';
    if let Some(at) = data.windows(TEXT_AT + 1).rposition(begins) {
        let length = (data.len() - at - TEXT_AT) as u32;
        data[at + LENGTH_AT..at + TEXT_AT].copy_from_slice(&length.to_be_bytes());
    }
}
