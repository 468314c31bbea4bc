//! What the kernel says of a network device of this process's own network namespace, which /sys
//! need not show.

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use std::os::fd::AsRawFd;

const MAX_NAME_BYTES: usize = 15;
/// An answer about one device has some 2 KB.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Of `struct nlmsghdr` and of `struct ifinfomsg`.
const HEADER: usize = 16;
const ABOUT: usize = 16;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_CARRIER: u16 = 33;
const IFLA_INFO_KIND: u16 = 1;
/// The two highest bits of an attribute's type are flags.
const KIND: u16 = 0x3fff;
const ENODEV: i32 = 19;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub is_tap: bool,
    /// Of a tap: whether some process holds it, also while the device is down.
    pub has_carrier: bool,
}

/// The device of that name; none if there is none.
pub(super) fn link(name: &str) -> Result<Option<Link>> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Ok(None);
    }
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    );
    let socket = socket.context("opening a netlink socket")?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &question(name), &kernel, MsgFlags::empty())
        .with_context(|| format!("asking the kernel for {name}"))?;
    let mut answer = vec![0; MAX_ANSWER_BYTES];
    let len = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())
        .with_context(|| format!("waiting for {name}'s state"))?;
    parse(answer.get(..len).unwrap_or_default()).with_context(|| format!("reading {name}'s state"))
}

fn question(name: &str) -> Vec<u8> {
    let attribute = 4 + name.len() + 1;
    let padded = attribute.next_multiple_of(4);
    let mut message = Vec::with_capacity(HEADER + ABOUT + padded);
    let small = |value: usize| u16::try_from(value).unwrap_or(u16::MAX).to_ne_bytes();
    message.extend(u32::try_from(HEADER + ABOUT + padded).unwrap_or(u32::MAX).to_ne_bytes());
    message.extend(RTM_GETLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8 + ABOUT]);
    message.extend(small(attribute));
    message.extend(IFLA_IFNAME.to_ne_bytes());
    message.extend(name.as_bytes());
    message.resize(HEADER + ABOUT + padded, 0);
    message
}

fn parse(answer: &[u8]) -> Result<Option<Link>> {
    let kind = answer.get(4..6).and_then(|bytes| Some(u16::from_ne_bytes(bytes.try_into().ok()?)));
    match kind {
        Some(NLMSG_ERROR) => {
            let code = answer
                .get(HEADER..HEADER + 4)
                .and_then(|bytes| Some(i32::from_ne_bytes(bytes.try_into().ok()?)));
            match code {
                Some(code) if code == -ENODEV => Ok(None),
                code => bail!("the kernel answered error {code:?}"),
            }
        }
        Some(RTM_NEWLINK) => {
            let mut link = Link { is_tap: false, has_carrier: false };
            for (kind, value) in attributes(answer.get(HEADER + ABOUT..).unwrap_or_default()) {
                match kind {
                    IFLA_CARRIER => link.has_carrier = value.first() == Some(&1),
                    IFLA_LINKINFO => {
                        link.is_tap = attributes(value)
                            .any(|(kind, value)| kind == IFLA_INFO_KIND && value == b"tun\0")
                    }
                    _ => {}
                }
            }
            Ok(Some(link))
        }
        other => bail!("the kernel answered message {other:?}"),
    }
}

/// Type and value of each attribute; what is cut off ends them.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let number = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let (len, kind) = (usize::from(number(0)?), number(2)? & KIND);
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn link_is_looked_up_by_its_name() {
        assert_eq!(link("lo").unwrap().map(|link| link.is_tap), Some(false));
        for name in ["", "no-such-link-0", "longer-than-a-name-may-be"] {
            assert_eq!(link(name).unwrap(), None, "{name}");
        }
    }

    #[test]
    fn link_answers_that_are_cut_off_are_no_panic() {
        let mut answer = [0; HEADER + ABOUT].to_vec();
        answer[4..6].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
        for (kind, value) in
            [(IFLA_CARRIER, &[1, 0, 0, 0][..]), (IFLA_LINKINFO, &[8, 0, 1, 0, b't', b'u', b'n', 0])]
        {
            answer.extend(u16::try_from(4 + value.len()).unwrap().to_ne_bytes());
            answer.extend(kind.to_ne_bytes());
            answer.extend(value);
        }
        assert_eq!(parse(&answer).unwrap(), Some(Link { is_tap: true, has_carrier: true }));
        for len in 0..answer.len() {
            let _ = parse(&answer[..len]);
        }
        answer[HEADER + ABOUT] = 1;
        parse(&answer).unwrap();
    }
}
