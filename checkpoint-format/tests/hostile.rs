//! Files whose digests are right and whose content lies: every number, text and list of a manifest
//! made another. Nothing may panic, and what a number claims may not become memory.

mod common;

use checkpoint_format::*;
use common::*;
use serde_json::{Value, json};

/// What all of it may take, in address space: far more than the samples need, far less than any
/// claim.
const MOST_BYTES: u64 = 512 << 20;

/// The most address space that this process has had.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).expect("Linux says so");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Every place in the document, as a JSON pointer.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Array(list) => list
            .iter()
            .enumerate()
            .for_each(|(number, one)| places(one, &format!("{at}/{number}"), found)),
        Value::Object(map) => {
            map.iter().for_each(|(key, one)| places(one, &format!("{at}/{key}"), found))
        }
        _ => {}
    }
}

/// What may stand there instead.
fn lies(value: &Value) -> Vec<Value> {
    match value {
        Value::Number(number) => {
            let now = number.as_u64().unwrap_or(0);
            let near = [now.wrapping_sub(1), now + 1, now * 2, now / 2, now << 20];
            let far = [
                0,
                1,
                4095,
                u64::from(u32::MAX),
                1 << 32,
                1 << 40,
                1 << 52,
                (1 << 52) + 1,
                1 << 63,
                u64::MAX,
            ];
            let other = [json!(-1), json!(1.5), json!(1e300), json!("7"), json!(null)];
            near.into_iter().chain(far).map(|number| json!(number)).chain(other).collect()
        }
        Value::String(text) => {
            let texts = [
                "",
                "..",
                "../../etc/passwd",
                "a/../b",
                "ram:..",
                "disk:a/../../b",
                "a\u{0}b",
                "a\nb",
                "\u{1b}[2J",
            ];
            let texts = texts.map(str::to_owned).into_iter();
            texts
                .chain([text.repeat(2), "x".repeat(MAX_TEXT + 1), text.to_uppercase()])
                .map(Value::from)
                .chain([json!(null)])
                .collect()
        }
        Value::Array(list) => {
            let twice: Vec<Value> = list.iter().chain(list).cloned().collect();
            let many = list.first().map(|first| vec![first.clone(); 300]).unwrap_or_default();
            let nested = (0..200).fold(json!([]), |inner, _| json!([inner]));
            vec![json!([]), Value::from(twice), Value::from(many), json!([null]), nested]
        }
        Value::Object(_) => vec![json!({}), json!([]), json!(null)],
        Value::Bool(now) => vec![json!(!now), json!(null)],
        Value::Null => vec![json!(0), json!(1), json!(u64::MAX), json!("x")],
    }
}

fn with(document: &Value, place: &str, lie: Value) -> Vec<u8> {
    let mut changed = document.clone();
    *changed.pointer_mut(place).expect("it was found there") = lie;
    serde_json::to_vec(&changed).expect("JSON")
}

fn wrapped(kind: &str, body: &[u8]) -> Vec<u8> {
    let line = format!("{kind} {} {}\n", ContentDigest::of(body), body.len());
    [line.as_bytes(), body].concat()
}

/// What a restore does first with a manifest that parses.
fn use_manifest(manifest: &Manifest) {
    let pack = sample_pack(PackId([0xab; 16]));
    let index = pack.info.parse_index(&pack.chunks[pack.chunks.len() - 2]).expect("sound");
    for space in &manifest.spaces {
        let mut map = PageMap::new(space.name.clone(), PageCount(0));
        map.resize(space.pages());
        map.apply_pack(PackNo(0), &index).expect("the first");
        assert!(map.runs().count() < 100);
        assert!(map.frame_reads().len() <= index.frames().len());
        let mut table = DigestTable::sparse(ByteLen(1 << 20));
        table.apply_pack(&space.name, &index);
        table.truncate(space.pages());
    }
    for disk in &manifest.disks {
        let space = disk.space.as_ref().and_then(|name| manifest.space(name));
        assert!(space.is_none_or(|space| space.bytes == disk.virtual_size), "{disk:?}");
    }
    assert!(manifest.ram_blocks.iter().all(|block| block.used <= block.total));
    assert!(manifest.packs.iter().all(|pack| pack.info.len.0 <= MAX_PACK_LEN));
    assert!(manifest.encode().is_ok(), "what is read can be written");
}

fn use_layer(layer: &LayerManifest, table: &[u8]) {
    let parsed = layer.parse_table(table);
    if let Ok(table) = parsed {
        assert!(
            table
                .stored()
                .all(|(number, at)| number < layer.blocks() && layer.owner(at.owner).is_some())
        );
    }
}

#[test]
fn hostile_manifests_neither_panic_nor_allocate_what_they_claim() {
    let document: Value =
        serde_json::from_slice(body(&sample_manifest().encode().expect("sound"))).expect("JSON");
    let (layer, table) = sample_layer();
    let layer: Value = serde_json::from_slice(body(&layer.encode().expect("sound"))).expect("JSON");
    let (sparse, sparse_table) = sample_sparse_layer();
    let sparse: Value =
        serde_json::from_slice(body(&sparse.encode().expect("sound"))).expect("JSON");
    let begun = peak();
    let (mut refused, mut taken) = (0, 0);
    let mut count = |result: bool| *(if result { &mut taken } else { &mut refused }) += 1;
    for (kind, document) in [
        ("stillpoint-manifest 1", &document),
        ("stillpoint-layer 1", &layer),
        ("stillpoint-layer 2", &sparse),
    ] {
        let mut found = Vec::new();
        places(document, "", &mut found);
        for place in &found {
            for lie in lies(document.pointer(place).expect("it was found there")) {
                let file = wrapped(kind, &with(document, place, lie));
                let manifest = Manifest::parse(&file);
                manifest.iter().for_each(use_manifest);
                let layer = LayerManifest::parse(&file);
                if let Ok(layer) = &layer {
                    use_layer(layer, &table);
                    use_layer(layer, &sparse_table);
                }
                count(manifest.is_ok() || layer.is_ok());
            }
        }
    }
    assert!(
        refused > 500 && taken > 50,
        "{refused} refused, {taken} taken: is the document another?"
    );
    let grown = peak() - begun;
    assert!(grown < MOST_BYTES, "{} MiB of address space were taken", grown >> 20);
}

/// An empty text takes three bytes in the file.
#[test]
fn hostile_lists_end_at_their_limit() {
    let document: Value =
        serde_json::from_slice(body(&sample_manifest().encode().expect("sound"))).expect("JSON");
    let text = serde_json::to_string(&with_arguments(&document)).expect("JSON");
    let many = format!("[{}\"\"]", "\"\",".repeat(20 << 20));
    let file = envelope("stillpoint-manifest", text.replacen("\"HERE\"", &many, 1).as_bytes());
    let begun = peak();
    let error = Manifest::parse(&file).expect_err("too many");
    assert!(matches!(error, ManifestError::Json { .. }), "{error}");
    // All of the texts would take 480 MiB at least; the other tests beside this one take some too.
    assert!(peak() - begun < 320 << 20, "{} MiB", (peak() - begun) >> 20);
}

fn with_arguments(document: &Value) -> Value {
    let mut changed = document.clone();
    changed["machine"]["arguments"] = json!("HERE");
    changed
}

#[test]
fn hostile_spaces_must_fit_what_they_hold() {
    type Change = fn(&mut Manifest);
    let changes: [(Change, &str); 8] = [
        (|manifest| manifest.disks[0].virtual_size.0 /= 2, "another length than its space"),
        (|manifest| manifest.spaces[1].bytes.0 *= 2, "another length than its space"),
        (|manifest| manifest.spaces[0].bytes.0 += 4096, "another length than its space"),
        (|manifest| manifest.vm_record.ram_bytes.0 /= 2, "larger than the VM's RAM"),
        (
            |manifest| manifest.spaces[2].bytes = ByteLen(MAX_STATE_LEN.0 + 1),
            "longer than any device state",
        ),
        (|manifest| manifest.ram_blocks[0].page_size.0 = 1 << 40, "impossible page size"),
        (
            |manifest| manifest.disks[0].backing[0].len.0 = u64::MAX,
            "on a layer larger than a space",
        ),
        (|manifest| manifest.vm_record.arguments[0].push('\0'), "NUL byte"),
    ];
    for (change, words) in changes {
        let mut manifest = sample_manifest();
        change(&mut manifest);
        let error = manifest.encode().expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
    }
    let mut manifest = sample_manifest();
    for number in 0..3 {
        let bytes = ByteLen(MAX_CARRIED_RAM.0 / 2);
        let name = format!("vga{number}");
        manifest.spaces.push(SpaceRecord::new(SpaceName::ram(&name).expect("a name"), bytes));
        manifest.ram_blocks.push(RamBlockRecord {
            name,
            used: bytes,
            total: bytes,
            page_size: ByteLen(4096),
            shared: false,
        });
    }
    assert!(
        manifest.encode().expect_err("too much").to_string().contains("than a restore can hold")
    );
}
