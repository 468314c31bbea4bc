//! The spaces of a pack by number.

use std::sync::Arc;

use super::MAX_SPACES_PER_PACK;
use super::error::EncodeError;
use crate::names::SpaceName;

/// A space by its place in the [`SpaceTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub(crate) u16);

/// Gives the spaces of a checkpoint their numbers, once, before anything is encoded.
///
/// Frames are encoded on many threads and land in whichever pack is open. If each pack numbered its
/// spaces by itself, a frame could carry the number that its space has in *another* pack, and the
/// page would be restored into the wrong space with all checksums right. So one table is made
/// first, frames and packs share it, and every pack saves it whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceTable(Arc<[SpaceName]>);

impl SpaceTable {
    /// Numbers the spaces in the order given.
    ///
    /// # Errors
    /// When there are too many, or one is there twice.
    pub fn new(names: impl IntoIterator<Item = SpaceName>) -> Result<Self, EncodeError> {
        let names: Vec<_> = names.into_iter().collect();
        if names.len() > MAX_SPACES_PER_PACK {
            return Err(EncodeError::TooManySpaces {
                found: names.len(),
                limit: MAX_SPACES_PER_PACK,
            });
        }
        match first_duplicate(&names) {
            Some(name) => Err(EncodeError::DuplicateSpace { name: name.clone() }),
            None => Ok(Self(names.into())),
        }
    }

    /// The number of a space.
    pub fn id(&self, name: &SpaceName) -> Option<SpaceId> {
        let at = self.0.iter().position(|known| known == name)?;
        u16::try_from(at).ok().map(SpaceId)
    }

    /// The spaces, by number.
    pub fn names(&self) -> &[SpaceName] {
        &self.0
    }
}

pub(super) fn first_duplicate(names: &[SpaceName]) -> Option<&SpaceName> {
    let mut seen = std::collections::HashSet::new();
    names.iter().find(|name| !seen.insert(*name))
}

#[cfg(test)]
mod test {
    use super::*;

    fn ram(block: &str) -> SpaceName {
        SpaceName::ram(block).expect("a good name")
    }

    #[test]
    fn names_have_numbers_in_their_order() {
        let table = SpaceTable::new([ram("a"), ram("b")]).expect("two spaces");
        assert_eq!(table.id(&ram("b")), Some(SpaceId(1)));
        assert_eq!(table.id(&ram("c")), None);
    }

    #[test]
    fn a_name_twice_or_too_many_are_refused() {
        let twice = SpaceTable::new([ram("a"), ram("b"), ram("a")]);
        assert!(matches!(twice, Err(EncodeError::DuplicateSpace { .. })));
        let many = SpaceTable::new((0..=MAX_SPACES_PER_PACK).map(|n| ram(&n.to_string())));
        assert!(matches!(many, Err(EncodeError::TooManySpaces { .. })));
    }
}
