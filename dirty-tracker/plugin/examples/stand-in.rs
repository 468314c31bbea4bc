//! Stands in for QEMU in tests: loads the real plugin the way QEMU does, and writes to its memory
//! when told to.
//!
//! `stand-in PLUGIN SOCKET RAMFD SHARED_PAGES PRIVATE_PAGES …` prints `ready SHARED PRIVATE`
//! (addresses in hex) or `failed CODE`, then obeys lines on standard input, each answered with
//! `ok`: an operation, a memory (`s`hared or `p`rivate), page numbers. More arguments are those of
//! the QEMU for which it stands, seen in the list of processes.
//!
//! ```text
//! w write one byte in each page          r read one byte of each page
//! d discard each page (MADV_DONTNEED)    h ask for huge pages, for the whole memory
//! o write through another mapping        i install the plugin again; answers with the code
//! x FIRST COUNT discard pages in one call, as QEMU's balloon does: a hole, and MADV_DONTNEED
//! ```
#![allow(unsafe_code, reason = "it stands in for QEMU, which calls the plugin")]

use std::ffi::{CString, c_char, c_int, c_void};
use std::io::BufRead;
use std::os::fd::RawFd;

const PAGE: usize = 4096;
/// Memory starts at a multiple of this, so that huge pages are possible.
const HUGE: usize = 2 << 20;

type Install = unsafe extern "C" fn(u64, *const c_void, c_int, *const *const c_char) -> c_int;

struct Memory {
    start: *mut u8,
    pages: usize,
}

impl Memory {
    fn map(pages: usize, flags: c_int, fd: RawFd) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let len = pages * PAGE;
        // SAFETY: the first call reserves fresh addresses; the second replaces a part of just
        // these.
        let start = unsafe {
            let room = libc::mmap(
                std::ptr::null_mut(),
                len + HUGE,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(room, libc::MAP_FAILED);
            let aligned = room.add(room.align_offset(HUGE));
            libc::mmap(aligned, len, protection, flags | libc::MAP_FIXED, fd, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: start.cast(), pages }
    }

    fn at(&self, page: usize) -> *mut u8 {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.start.add(page * PAGE) }
    }

    fn write(&self, page: usize) {
        let at = self.at(page);
        // SAFETY: `at` is inside a writable mapping that is never unmapped; this program has no
        // other thread that uses it.
        unsafe { at.write_volatile(at.read_volatile().wrapping_add(1)) }
    }

    fn read(&self, page: usize) {
        // SAFETY: as for `write`.
        unsafe { self.at(page).read_volatile() };
    }

    /// QEMU's `ram_block_discard_range`.
    fn discard_range(&self, file: Option<RawFd>, first: usize, count: usize) {
        let (offset, len) =
            ((first * PAGE).cast_signed() as i64, (count * PAGE).cast_signed() as i64);
        if let Some(fd) = file {
            // SAFETY: takes integers; nothing here relies on the content of the file.
            let result = unsafe {
                libc::fallocate(
                    fd,
                    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    offset,
                    len,
                )
            };
            assert_eq!(result, 0, "fallocate");
        }
        self.advise(first, count, libc::MADV_DONTNEED);
    }

    fn advise(&self, page: usize, pages: usize, advice: c_int) {
        // SAFETY: applies to the mapping, whose content nothing here relies on.
        let result = unsafe { libc::madvise(self.at(page).cast(), pages * PAGE, advice) };
        assert_eq!(result, 0, "madvise {advice}");
    }
}

fn load(plugin: &str) -> Install {
    let path = CString::new(plugin).expect("a path");
    // SAFETY: the plugin's constructor may run in any process; the symbol has the type that QEMU's
    // plugin API gives it.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!library.is_null(), "cannot load {plugin}");
        let version = libc::dlsym(library, c"qemu_plugin_version".as_ptr()).cast::<c_int>();
        assert!(!version.is_null() && *version == 1, "no marks of a newer QEMU here");
        let install = libc::dlsym(library, c"qemu_plugin_install".as_ptr());
        assert!(!install.is_null());
        std::mem::transmute::<*mut c_void, Install>(install)
    }
}

fn call(install: Install, socket: &str, ram_fd: &str) -> c_int {
    let arguments = [format!("socket={socket}"), format!("ramfd={ram_fd}")]
        .map(|text| CString::new(text).expect("text"));
    let pointers = arguments.each_ref().map(|text| text.as_ptr());
    // SAFETY: two C strings that live for the call, as the API wants it.
    unsafe { install(1, std::ptr::null(), 2, pointers.as_ptr()) }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [plugin, socket, ram_fd, shared_pages, private_pages, ..] = arguments.as_slice() else {
        panic!("stand-in PLUGIN SOCKET RAMFD SHARED_PAGES PRIVATE_PAGES");
    };
    let fd = ram_fd.parse().expect("a descriptor");
    let shared_pages = shared_pages.parse().expect("a number");
    let shared = Memory::map(shared_pages, libc::MAP_SHARED, fd);
    let mut other = None;
    let private = Memory::map(
        private_pages.parse().expect("a number"),
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        -1,
    );
    let install = load(plugin);
    match call(install, socket, ram_fd) {
        0 => println!("ready {:x} {:x}", shared.start as usize, private.start as usize),
        code => return println!("failed {code}"),
    }
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a line");
        let mut words = line.split(' ');
        let operation = words.next().expect("an operation");
        let memory = match words.next() {
            Some("s") => &shared,
            _ => &private,
        };
        let pages = words.map(|word| word.parse().expect("a page"));
        match operation {
            "w" => pages.for_each(|page| memory.write(page)),
            "r" => pages.for_each(|page| memory.read(page)),
            "o" => {
                let other =
                    other.get_or_insert_with(|| Memory::map(shared_pages, libc::MAP_SHARED, fd));
                pages.for_each(|page| other.write(page));
            }
            "d" => pages.for_each(|page| memory.advise(page, 1, libc::MADV_DONTNEED)),
            "x" => {
                let [first, count] = pages.collect::<Vec<usize>>()[..] else {
                    panic!("x FIRST COUNT")
                };
                memory.discard_range(std::ptr::eq(memory, &shared).then_some(fd), first, count);
            }
            "h" => memory.advise(0, memory.pages, libc::MADV_HUGEPAGE),
            "i" => {
                println!("{}", call(install, socket, ram_fd));
                continue;
            }
            _ => panic!("unknown operation {line}"),
        }
        println!("ok");
    }
}
