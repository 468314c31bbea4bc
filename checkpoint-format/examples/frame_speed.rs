//! How fast frames are encoded and decoded, beside zstd, BLAKE3 and memcpy alone.
//!
//! `cargo run --release -p checkpoint-format --example frame_speed`

use std::hint::black_box;
use std::time::Instant;

use checkpoint_format::{
    Checksum, EncodedFrame, FRAME_PAGES, PAGE_SIZE, PackBuilder, PackId, PageCount, PageDigest,
    PageIndex, PageRange, PageSet, SpaceName, SpaceTable, ZSTD_LEVEL, is_zero,
};

const FRAME: usize = FRAME_PAGES * PAGE_SIZE;
const PASSES: usize = 2000;

/// Prints the best of many passes: on a busy VM the others measure the neighbours.
fn measure<T>(what: &str, mut work: impl FnMut() -> T) {
    let pass = |_| {
        let start = Instant::now();
        black_box(work());
        start.elapsed().as_secs_f64()
    };
    let best = (0..PASSES).map(pass).fold(f64::INFINITY, f64::min);
    let (micros, rate) = (best * 1e6, FRAME as f64 / best / 1e6);
    println!("{what:<32} {micros:>8.1} us {rate:>8.0} MB/s");
}

/// Halfway between text and VM code: words from a small vocabulary between random bytes.
fn ordinary() -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state >> 33
    };
    let word = |n: u64| if n.is_multiple_of(3) { n } else { n % 64 };
    let words = (0..FRAME / 8).flat_map(|_| word(next()).to_le_bytes());
    words.collect()
}

fn noise() -> Vec<u8> {
    let mut bytes = vec![0; FRAME];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

fn frames(what: &str, raw: &[u8]) {
    let spaces = SpaceTable::new([SpaceName::device_state()]).expect("one space");
    let space = spaces.id(&spaces.names()[0]).expect("the one space");
    let pages: Vec<_> = raw
        .chunks(PAGE_SIZE)
        .zip(0..)
        .map(|(page, number)| (PageIndex(number), PageDigest::of(page)))
        .collect();
    let encode = || EncodedFrame::encode(space, &pages, raw, ZSTD_LEVEL).expect("good pages");
    println!("{what}: {} of {FRAME} bytes stored", encode().stored_len());
    measure("  encode", encode);
    let mut pack = PackBuilder::new(PackId([0; 16]), &spaces);
    pack.push_frame(encode()).expect("room");
    let pack = pack.finish().expect("small");
    let index = pack.info.parse_index(&pack.chunks[2]).expect("sound");
    let entry = index.frames()[0];
    measure("  decode", || entry.decode(&pack.chunks[1]).expect("sound"));
    let mut zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL).expect("a valid level");
    let mut out = Vec::with_capacity(2 * FRAME);
    measure("  zstd alone, there", || zstd.compress_to_buffer(raw, &mut out).expect("room"));
    let mut back = zstd::bulk::Decompressor::new().expect("memory");
    measure("  zstd alone, back", || back.decompress(&out, FRAME).expect("sound"));
}

fn main() {
    let (ordinary, noise) = (ordinary(), noise());
    frames("ordinary", &ordinary);
    frames("noise", &noise);
    measure("memcpy", || noise.to_vec());
    measure("checksum", || Checksum::of(&noise));
    let shifted = [&[0; 40], &noise[..]].concat();
    measure("checksum, shifted by 40", || Checksum::of(&shifted[40..]));
    measure("memcpy, shifted by 40", || shifted[40..].to_vec());
    measure("checksum behind a few bytes", || {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"a few").update(&noise).finalize()
    });
    measure("64 page digests", || {
        noise.chunks(PAGE_SIZE).map(PageDigest::of).fold(0, |sum, digest| sum ^ digest.0[0])
    });
    let zeros = vec![0; FRAME];
    measure("is_zero", || is_zero(black_box(&zeros)));
    let mut set = PageSet::new(PageCount(1 << 18));
    (0..1 << 18).step_by(3).for_each(|page| set.insert(PageIndex(page)));
    let start = Instant::now();
    let ranges = black_box(set.ranges().map(PageRange::len).map(PageCount::get).sum::<u64>());
    println!("{ranges} scattered ranges of a GiB in {:?}", start.elapsed());
}
