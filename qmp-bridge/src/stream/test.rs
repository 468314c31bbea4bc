//! The writer's own rules; that QEMU takes the result is shown with real ones in
//! `tests/restore.rs`.

use super::*;

fn block(name: &str, used: u64, shared: bool) -> StreamBlock {
    StreamBlock { name: name.into(), used, address: 0, shared }
}

fn devices() -> DeviceState {
    DeviceState::from_bytes([&STREAM_HEADER[..], &[4, 9, 9, 0]].concat()).expect("state")
}

#[test]
fn the_bytes_of_a_small_stream() {
    let blocks = vec![block("pc.ram", 8192, true), block("rom", 8192, false)];
    let mut writer = StreamWriter::new("pc", blocks).expect("writer");
    writer.page(1, 0, &[7; STREAM_PAGE]).expect("data page");
    writer.page(1, 4096, &[0; STREAM_PAGE]).expect("zero page");
    let mut bytes = writer.take();
    assert_eq!(writer.buffered(), 0);
    bytes.extend(writer.finish(&devices()).expect("finish"));
    let mut wanted = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared".to_vec();
    wanted.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x40\x04");
    wanted.extend(
        b"\x06pc.ram\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0\0\x03rom\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0\0",
    );
    wanted.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x03\0\0\0\x02");
    wanted.extend(b"\0\0\0\0\0\0\0\x08\x03rom");
    wanted.extend([7; STREAM_PAGE]);
    wanted.extend(b"\0\0\0\0\0\0\x10\x22\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x04\x09\x09\0");
    wanted.extend(b"\x06\0\0\0\x02{}");
    assert_eq!(bytes, wanted);
}

#[test]
fn pages_come_all_and_in_order() {
    let blocks = vec![block("pc.ram", 8192, true), block("rom", 8192, false)];
    let mut writer = StreamWriter::new("pc", blocks.clone()).expect("writer");
    let page = [1; STREAM_PAGE];
    assert!(matches!(writer.page(0, 0, &page), Err(StreamError::Shared { .. })));
    assert!(matches!(writer.page(2, 0, &page), Err(StreamError::NoSuchBlock(2))));
    assert!(matches!(writer.page(1, 4096, &page), Err(StreamError::Order { .. })));
    assert!(matches!(writer.page(1, 0, &page[1..]), Err(StreamError::PageLength { .. })));
    writer.page(1, 0, &page).expect("first");
    assert!(matches!(writer.page(1, 0, &page), Err(StreamError::Order { .. })));
    assert!(matches!(writer.finish(&devices()), Err(StreamError::Incomplete { given: 4096, .. })));
    let mut writer = StreamWriter::new("pc", blocks).expect("writer");
    writer.page(1, 0, &page).and_then(|()| writer.page(1, 4096, &page)).expect("both");
    assert!(matches!(writer.page(1, 8192, &page), Err(StreamError::Order { .. })));
}

#[test]
fn what_the_form_cannot_hold_is_refused() {
    let long = "x".repeat(256);
    assert!(matches!(StreamWriter::new(&long, vec![]), Err(StreamError::Name(_))));
    assert!(matches!(
        StreamWriter::new("pc", vec![block("", 0, false)]),
        Err(StreamError::Name(_))
    ));
    assert!(matches!(
        StreamWriter::new("pc", vec![block("a", 5, false)]),
        Err(StreamError::UnevenBlock { .. })
    ));
    let huge = 1 << 63;
    let two = vec![block("a", huge, true), block("b", huge, true)];
    assert_eq!(StreamWriter::new("pc", two).err(), Some(StreamError::Overflow));
}
