//! The reader on streams made here, sound and not. Real ones are read in `tests/stream_files.rs`.

use std::io::Cursor;

use super::*;
use crate::stream_format::{configuration as names, ram as flags};

const SECTION: u32 = 2;
const TWO: [(&str, u64); 2] = [("pc.ram", 0x3000), ("rom", 0x1000)];
const TIMER: &str =
    r#"{"name":"timer","instance_id":0,"fields":[{"size":4,"array_len":2},{"size":1}]}"#;

/// A stream in the making.
#[derive(Clone)]
struct Stream(Vec<u8>);

impl Stream {
    fn header() -> Self {
        Self(STREAM_HEADER.to_vec())
    }

    /// Header and configuration.
    fn begin() -> Self {
        Self::header().configuration("pc")
    }

    /// The same and two blocks.
    fn listed() -> Self {
        Self::begin().start("ram", 0, 4).list(&TWO).end()
    }

    /// The same and all memory.
    fn with_memory() -> Self {
        let part =
            Self::listed().section(mark::SECTION_PART).zero(0, Some("pc.ram")).zero(0x1000, None);
        part.zero(0x2000, None).zero(0, Some("rom")).end().section(mark::SECTION_END).end()
    }

    fn with(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend(bytes.as_ref());
        self
    }

    fn u32(self, number: u32) -> Self {
        self.with(number.to_be_bytes())
    }

    fn u64(self, number: u64) -> Self {
        self.with(number.to_be_bytes())
    }

    fn name(self, name: &str) -> Self {
        self.with([name.len() as u8]).with(name)
    }

    fn configuration(self, vm: &str) -> Self {
        self.with([mark::CONFIGURATION]).u32(vm.len() as u32).with(vm)
    }

    fn subsection(self, name: &str) -> Self {
        self.with([mark::SUBSECTION]).name(name).u32(1)
    }

    fn section(self, kind: u8) -> Self {
        self.with([kind]).u32(SECTION)
    }

    fn start(self, name: &str, instance: u32, version: u32) -> Self {
        self.section(mark::SECTION_START).name(name).u32(instance).u32(version)
    }

    fn list(self, blocks: &[(&str, u64)]) -> Self {
        let total: u64 = blocks.iter().map(|(_, used)| used).sum();
        let head = self.u64(total | flags::MEM_SIZE);
        blocks.iter().fold(head, |stream, (name, used)| stream.name(name).u64(*used))
    }

    fn record(self, offset: u64, flag: u64, block: Option<&str>) -> Self {
        match block {
            Some(name) => self.u64(offset | flag).name(name),
            None => self.u64(offset | flag | flags::CONTINUE),
        }
    }

    fn zero(self, offset: u64, block: Option<&str>) -> Self {
        self.record(offset, flags::ZERO, block).with([0])
    }

    fn end(self) -> Self {
        self.u64(flags::END).footer(SECTION)
    }

    fn footer(self, section: u32) -> Self {
        self.with([mark::SECTION_FOOTER]).u32(section)
    }

    fn command(self, number: u16, data: &[u8]) -> Self {
        self.with([mark::COMMAND])
            .with(number.to_be_bytes())
            .with((data.len() as u16).to_be_bytes())
            .with(data)
    }

    fn device(self, id: u32, name: &str, instance: u32, data: &[u8]) -> Self {
        self.with([mark::SECTION_FULL])
            .u32(id)
            .name(name)
            .u32(instance)
            .u32(1)
            .with(data)
            .footer(id)
    }

    fn timer(self) -> Self {
        self.device(0, "timer", 0, &[7; 9])
    }

    fn description(self, text: &str) -> Self {
        self.with([mark::END_OF_STREAM, mark::DESCRIPTION]).u32(text.len() as u32).with(text)
    }

    fn devices(self, list: &str) -> Self {
        self.description(&format!(
            r#"{{"configuration":{{}},"page_size":4096,"devices":[{list}]}}"#
        ))
    }

    fn reader(&self) -> StreamReader<Cursor<&[u8]>> {
        StreamReader::new(Cursor::new(&self.0), ReaderLimits::default())
    }

    /// The error that reading all of it ends with.
    fn error(&self) -> StreamReadError {
        let mut reader = self.reader();
        loop {
            match reader.next() {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it was read without an error"),
                Err(error) => return error,
            }
        }
    }
}

fn assert_error(what: &str, stream: &Stream, wanted: &[&str]) {
    let text = stream.error().to_string();
    for part in wanted {
        assert!(text.contains(part), "{what}: {text:?} has no {part:?}");
    }
}

/// Items as text, pages by their first byte.
fn items(stream: &Stream) -> Vec<String> {
    let mut reader = stream.reader();
    let mut items = Vec::new();
    while let Some(item) = reader.next().expect("sound") {
        items.push(match item {
            Item::Page { block, offset, bytes } => {
                assert_eq!(bytes, [bytes[0]; STREAM_PAGE]);
                format!("page {block} {offset:#x} {:#x}", bytes[0])
            }
            Item::Zero { block, offset } => format!("zero {block} {offset:#x}"),
            Item::Blocks(blocks) => format!("blocks {blocks:?}"),
            Item::Devices(state) => format!("devices {}", state.as_bytes().len()),
            other => format!("{other:?}"),
        });
    }
    items
}

#[test]
fn all_items_of_a_pre_copy() {
    let stream = Stream::header().configuration("pc-q35-10.0").subsection(names::PAGE_BITS).u32(12);
    let stream = stream
        .subsection(names::CAPABILITIES)
        .u32(1)
        .name("x-ignore-shared")
        .subsection(names::UUID)
        .with([9; 16]);
    let stream = stream.start("ram", 0, 4).u64(0x4000 | flags::MEM_SIZE);
    let stream =
        stream.name("pc.ram").u64(0x3000).u64(0x10_0000).name("rom").u64(0x1000).u64(0).end();
    let stream = stream
        .section(mark::SECTION_PART)
        .record(0x2000, flags::PAGE, Some("pc.ram"))
        .with([5; STREAM_PAGE]);
    let stream = stream.record(0x1000, flags::ZERO, None).with([0xff]).zero(0, Some("rom")).end();
    let stream = stream.command(11, &[]).section(mark::SECTION_END).zero(0, None).end();
    let stream = stream
        .timer()
        .device(7, "cpu", 1, &[])
        .devices(&format!(r#"{TIMER},{{"name":"cpu","instance_id":1}}"#));
    let blocks = r#"[StreamRamBlock { name: "pc.ram", used: 12288, address: Some(1048576) }, StreamRamBlock { name: "rom", used: 4096, address: Some(0) }]"#;
    let wanted = [
        r#"Configuration { machine_type: "pc-q35-10.0", capabilities: ["x-ignore-shared"] }"#,
        &format!("blocks {blocks}"),
        "page 0 0x2000 0x5",
        "page 0 0x1000 0xff",
        "zero 1 0x0",
        "PassEnd",
        "zero 1 0x0",
        "RamEnd",
        "devices 64",
    ];
    assert_eq!(items(&stream), wanted);
}

#[test]
fn a_background_snapshot_has_no_end_section() {
    let stream = Stream::listed().section(mark::SECTION_PART).zero(0, Some("rom")).end();
    let stream = stream.section(mark::SECTION_PART).zero(0, None).end().timer().devices(TIMER);
    let items = items(&stream);
    assert_eq!(
        items[2..],
        ["zero 1 0x0", "PassEnd", "zero 1 0x0", "PassEnd", "RamEnd", "devices 42"]
    );
}

#[test]
fn device_sections_are_listed_and_split_by_fields_and_subsections() {
    let content =
        Stream(vec![1; 6]).subsection("cpu/fpu").with([2; 8]).subsection("cpu/fpu/x").with([3]);
    let description = r#"{"name":"cpu","instance_id":3,"version":12,
        "fields":[{"name":"a","type":"struct","struct":{"vmsd_name":"x","fields":[{"size":100}]},"size":6}],
        "subsections":[{"vmsd_name":"cpu/fpu","version":1,"fields":[{"size":8}],
            "subsections":[{"vmsd_name":"cpu/fpu/x","version":1,"fields":[{"size":1}]}]}]}"#;
    let stream = Stream::with_memory()
        .timer()
        .device(5, "cpu", 3, &content.0)
        .devices(&format!("{TIMER},{description}"));
    let mut reader = stream.reader();
    assert!(reader.device_sections().is_empty());
    let mut state = None;
    while let Some(item) = reader.next().expect("sound") {
        if let Item::Devices(devices) = item {
            state = Some(devices);
        }
    }
    let state = state.expect("devices");
    let [timer, cpu] = reader.device_sections() else { panic!("two sections") };
    assert_eq!((timer.id, timer.name.as_str(), timer.instance, timer.version), (0, "timer", 0, 1));
    assert_eq!((cpu.id, cpu.name.as_str(), cpu.instance, cpu.version), (5, "cpu", 3, 1));
    assert_eq!(timer.bytes.start, STREAM_HEADER.len());
    assert_eq!(timer.bytes.end, cpu.bytes.start);
    assert!(state.as_bytes()[cpu.bytes.clone()].ends_with(&Stream(content.0).footer(5).0));
    assert_eq!(reader.position(), stream.0.len() as u64);
}

#[test]
fn nothing_comes_after_an_error_or_the_end() {
    let stream = Stream::with_memory().timer().devices(TIMER);
    let mut reader = stream.reader();
    while reader.next().expect("sound").is_some() {}
    assert!(reader.next().expect("still the end").is_none());
    let cut = Stream(stream.0[..100].to_vec());
    let mut reader = cut.reader();
    let error = loop {
        if let Err(error) = reader.next() {
            break error;
        }
    };
    assert!(error.is_cut_off(), "{error}");
    assert!(error.to_string().contains("after 100 bytes"), "{error}");
    assert!(matches!(reader.next(), Err(StreamReadError::GivenUp)));
}

#[test]
fn a_broken_source_is_an_error_of_its_own() {
    struct Broken(std::io::ErrorKind);
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(self.0.into())
        }
    }
    let error = |kind| {
        StreamReader::new(Broken(kind), ReaderLimits::default())
            .next()
            .map(drop)
            .expect_err("broken")
    };
    let timeout = error(std::io::ErrorKind::WouldBlock);
    assert!(
        timeout.is_cut_off() && matches!(timeout, StreamReadError::Io { at: 0, .. }),
        "{timeout}"
    );
    let reset = error(std::io::ErrorKind::ConnectionReset);
    assert!(
        reset.is_cut_off() && matches!(reset, StreamReadError::CutOff { at: 0, .. }),
        "{reset}"
    );
    assert!(!Stream::begin().with([9]).error().is_cut_off());
}

#[test]
fn beginnings_that_are_not_understood() {
    let long = "x".repeat(256);
    let cases: [(&str, Stream, &[&str]); 12] = [
        ("magic", Stream(b"GARBAGE!".to_vec()), &["`GARBAGE!`", "`QEVM`"]),
        ("version", Stream(b"QEVM\0\0\0\x02".to_vec()), &[r"`QEVM\x00\x00\x00\x02`"]),
        ("none", Stream::header().start("ram", 0, 4), &["0x01", "before 2.4"]),
        ("long", Stream::header().configuration(&long), &["at byte 9", "256", "limit of 255"]),
        ("empty", Stream::header().configuration(""), &["a name"]),
        (
            "binary",
            Stream::header().with([mark::CONFIGURATION]).u32(2).with([0xff, 0xff]),
            &["not UTF-8"],
        ),
        (
            "many",
            Stream::begin().subsection(names::CAPABILITIES).u32(65),
            &["list of capabilities", "limit of 64"],
        ),
        (
            "mapped",
            Stream::begin().subsection(names::CAPABILITIES).u32(1).name("mapped-ram"),
            &["`mapped-ram`", "turn it off"],
        ),
        ("bits", Stream::begin().subsection(names::PAGE_BITS).u32(14), &["2^14"]),
        (
            "unknown",
            Stream::begin().subsection("configuration/new"),
            &["`configuration/new`", "not supported"],
        ),
        (
            "version of it",
            Stream::begin().with([mark::SUBSECTION]).name(names::UUID).u32(2),
            &["version 2", "version 1"],
        ),
        (
            "twice",
            Stream::begin()
                .subsection(names::PAGE_BITS)
                .u32(12)
                .subsection(names::PAGE_BITS)
                .u32(12),
            &["a second `configuration/target-page-bits`"],
        ),
    ];
    for (what, stream, wanted) in cases {
        assert_error(what, &stream, wanted);
    }
    let twice = Stream::begin()
        .subsection(names::CAPABILITIES)
        .u32(2)
        .name("x-ignore-shared")
        .name("x-ignore-shared");
    assert_error("capability twice", &twice, &["a second `x-ignore-shared`"]);
}

#[test]
fn sections_and_commands_that_are_refused() {
    let cases: [(&str, Stream, &[&str]); 19] = [
        (
            "bitmaps",
            Stream::begin().start("dirty-bitmap", 0, 1),
            &["`dirty-bitmap`", "`dirty-bitmaps`"],
        ),
        (
            "block",
            Stream::begin().start("block", 0, 1),
            &["passes of `block`", "capability `block`"],
        ),
        (
            "vfio",
            Stream::begin().start("0000:00:02.0/vfio", 0, 1),
            &["`0000:00:02.0/vfio`", "remove the device"],
        ),
        ("second", Stream::listed().start("ram", 0, 4), &["a second START"]),
        ("instance", Stream::begin().start("ram", 1, 4), &["instance 1"]),
        ("version", Stream::begin().start("ram", 0, 3), &["version 3"]),
        (
            "early",
            Stream::begin().device(1, "virtio-mem-early", 0, &[0; 30]),
            &["`virtio-mem-early` before memory", "byte 15"],
        ),
        ("early too", Stream::listed().timer(), &["`timer` before memory"]),
        ("return path", Stream::begin().command(1, &[]), &["OPEN_RETURN_PATH", "`return-path`"]),
        ("ping", Stream::begin().command(2, &[0; 4]), &["PING", "`return-path`"]),
        ("postcopy", Stream::begin().command(3, &[0; 16]), &["POSTCOPY_ADVISE", "`postcopy-ram`"]),
        ("colo", Stream::listed().command(8, &[]), &["ENABLE_COLO"]),
        ("new", Stream::listed().command(12, &[]), &["the command 12"]),
        ("data", Stream::listed().command(11, &[1]), &["SWITCHOVER_START with 1 bytes"]),
        ("two", Stream::listed().command(11, &[]).command(11, &[]), &["a command"]),
        ("too early", Stream::begin().command(11, &[]), &["a command"]),
        ("part", Stream::begin().section(mark::SECTION_PART), &["a PART section"]),
        ("end", Stream::begin().with([0]), &["the end mark"]),
        ("mark", Stream::listed().with([0x42]), &["0x42"]),
    ];
    for (what, stream, wanted) in cases {
        assert_error(what, &stream, wanted);
    }
    let other = Stream::listed().with([mark::SECTION_PART]).u32(3);
    assert_error("number", &other, &["section 3", "section 2"]);
    let none = Stream::begin().start("ram", 0, 4).end().section(mark::SECTION_PART);
    assert_error("no list", &none, &["a PART section", "a list of RAM blocks"]);
    let late = Stream::with_memory().section(mark::SECTION_PART);
    assert_error("after END", &late, &["a PART section", "the first device section"]);
}

#[test]
fn memory_that_does_not_add_up() {
    let open = || Stream::begin().start("ram", 0, 4);
    let part = || Stream::listed().section(mark::SECTION_PART);
    let cases: [(&str, Stream, &[&str]); 18] = [
        ("duplicate", open().list(&[("a", 4096), ("a", 4096)]), &["a second RAM block `a`"]),
        (
            "uneven",
            open().u64(0x1000 | flags::MEM_SIZE).name("a").u64(0x800),
            &["`a` of 0x800", "multiple of 4096"],
        ),
        (
            "more than all",
            open().u64(0x1000 | flags::MEM_SIZE).name("a").u64(0x2000),
            &["0x2000", "total of 0x1000"],
        ),
        ("nameless", open().u64(0x1000 | flags::MEM_SIZE).name(""), &["a name"]),
        ("again", Stream::listed().section(mark::SECTION_PART).list(&TWO), &["a second list"]),
        ("no list", open().zero(0, Some("rom")), &["the list of RAM blocks before"]),
        (
            "in START",
            open().list(&TWO).zero(0, Some("rom")),
            &["a page in the START section", "byte 67"],
        ),
        ("no block", part().zero(0, None), &["of the same block"]),
        ("unknown block", part().zero(0, Some("flash")), &["`flash`"]),
        ("outside", part().zero(0x1000, Some("rom")), &["0x1000 of the RAM block `rom`"]),
        ("far outside", part().zero(!flags::FLAGS, Some("rom")), &["0xfffffffffffff000"]),
        ("nothing", part().u64(0x1000), &["record 0x1000"]),
        ("both", part().u64(flags::ZERO | flags::PAGE), &["record 0xa"]),
        ("end with more", part().u64(0x1000 | flags::END), &["record 0x1010"]),
        ("xbzrle", part().u64(0x40), &["XBZRLE", "`xbzrle`"]),
        ("compressed", part().u64(0x1100), &["compressed", "`compress`"]),
        ("multifd", open().list(&TWO).u64(0x200), &["multifd"]),
        ("hook", part().u64(0x80), &["RDMA"]),
    ];
    for (what, stream, wanted) in cases {
        assert_error(what, &stream, wanted);
    }
    let footer = Stream::begin().start("ram", 0, 4).list(&TWO).u64(flags::END);
    assert_error("footer", &footer.clone().footer(3), &["0x7e and 3", "section 2"]);
    assert_error("no footer", &footer.section(mark::SECTION_PART), &["0x02 and 2", "before 2.4"]);
}

#[test]
fn blocks_are_limited() {
    let limits = ReaderLimits { blocks: 1, ..ReaderLimits::default() };
    let stream = Stream::listed();
    let mut reader = StreamReader::new(Cursor::new(&stream.0), limits);
    reader.next().expect("configuration");
    assert!(matches!(reader.next(), Err(StreamReadError::TooLarge { found: 2, limit: 1, .. })));
    assert_eq!(
        Ram::new(1, false, usize::MAX),
        Ram::new(1, false, MAX_RAM_BLOCKS),
        "no limit above the general one"
    );
}

#[test]
fn device_parts_that_do_not_fit_their_description() {
    let memory = Stream::with_memory();
    let timer = || memory.clone().timer();
    let overflow = r#"{"name":"timer","instance_id":0,"fields":[{"size":18446744073709551615,"array_len":2}]}"#;
    let sum =
        r#"{"name":"timer","instance_id":0,"fields":[{"size":18446744073709551615},{"size":1}]}"#;
    let huge = r#"{"name":"timer","instance_id":0,"fields":[{"size":18446744073709551615}]}"#;
    let long = TIMER.replace(r#""size":1"#, r#""size":2"#);
    let short = TIMER.replace(r#""size":1"#, r#""size":0"#);
    let cases: [(&str, Stream, &[&str]); 15] = [
        ("name", timer().devices(&TIMER.replace("timer", "cpu")), &["section `timer`", "`cpu`"]),
        (
            "instance",
            timer().devices(&TIMER.replace(":0,", ":1,")),
            &["of instance 0", "of instance 1"],
        ),
        ("long", timer().devices(&long), &["fewer than 4 bytes", "10 bytes"]),
        ("short", timer().devices(&short), &["footer", "8 bytes"]),
        ("huge", timer().devices(huge), &["fewer than"]),
        ("overflow", timer().devices(overflow), &["overflow"]),
        ("sum", timer().devices(sum), &["overflow"]),
        ("negative", timer().devices(&TIMER.replace(":4", ":-4")), &["not understood"]),
        (
            "one more described",
            timer().devices(&format!("{TIMER},{TIMER}")),
            &["fewer than 1 bytes"],
        ),
        ("one less described", timer().timer().devices(TIMER), &["more bytes after the last"]),
        ("no JSON", timer().description("{"), &["not understood"]),
        ("no list", timer().description(r#"{"page_size":4096}"#), &["devices"]),
        (
            "page size",
            timer().description(r#"{"page_size":8192,"devices":[]}"#),
            &["page size of 8192"],
        ),
        (
            "kind",
            memory
                .clone()
                .timer()
                .with([mark::SECTION_PART])
                .u32(0)
                .devices(&format!("{TIMER},{TIMER}")),
            &["a PART"],
        ),
        ("nothing", memory.clone().devices(""), &["the end mark"]),
    ];
    for (what, stream, wanted) in cases {
        assert_error(what, &stream, wanted);
    }
    let deep = format!("{}{}", r#"{"a":"#.repeat(200), "}".repeat(200));
    assert_error("deep", &timer().description(&deep), &["not understood"]);
}

#[test]
fn without_a_description_the_option_is_named() {
    let suppressed = Stream::with_memory().timer().with([mark::END_OF_STREAM]);
    assert_error("suppressed", &suppressed, &["suppress-vmdesc", "query-migrate"]);
    let cut = Stream::with_memory().timer();
    assert!(cut.error().is_cut_off());
    let trailing = Stream::with_memory().timer().devices(TIMER).with([0]);
    assert!(trailing.error().is_cut_off(), "{}", trailing.error());
}

#[test]
fn the_device_part_is_limited_before_it_is_held() {
    let stream = Stream::with_memory();
    let limits = ReaderLimits {
        read_buffer: 0,
        devices: 1 << 16,
        description: 1 << 16,
        ..ReaderLimits::default()
    };
    let endless = stream.0.chain(std::io::repeat(mark::SECTION_FULL)).take(1 << 28);
    let mut reader = StreamReader::new(endless, limits.clone());
    let error = loop {
        if let Err(error) = reader.next() {
            break error;
        }
    };
    assert!(matches!(error, StreamReadError::TooLarge { limit: 131_077, .. }), "{error}");
    assert!(reader.position() < (1 << 17) + 3 * MIN_READ_BUFFER as u64);

    let memory = Stream::with_memory();
    let name = |length| format!(r#"{{"name":"{}","instance_id":0}}"#, "x".repeat(length));
    let error = |stream: Stream, limits| {
        let mut reader = StreamReader::new(Cursor::new(stream.0), limits);
        loop {
            match reader.next() {
                Ok(Some(_)) => {}
                Ok(None) => break None,
                Err(error) => break Some(error.to_string()),
            }
        }
    };
    let tight = |devices, description| ReaderLimits { devices, description, ..limits.clone() };
    let sound = || memory.clone().timer().devices(TIMER);
    let description =
        format!(r#"{{"configuration":{{}},"page_size":4096,"devices":[{TIMER}]}}"#).len() as u64;
    assert_eq!(error(sound(), tight(42, description)), None);
    assert!(
        error(sound(), tight(41, description + 1))
            .is_some_and(|text| text.contains("the device part"))
    );
    assert!(
        error(sound(), tight(43, description - 1))
            .is_some_and(|text| text.contains("the description"))
    );
    assert!(
        error(memory.clone().timer().devices(&name(1 << 16)), tight(1 << 17, 1 << 10)).is_some()
    );
}
