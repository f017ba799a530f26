//! Whole sets of members in pages: a page is closed when it is large enough, the last one carries the number of members
//! and a digest over all of them, and the receiver takes the set only if both agree.

use std::collections::BTreeSet;
use std::mem;

use prost::Message;
use trainyard_common::bundle::{DesiredBundle, ObservedBundle};
use trainyard_common::ids::{AttemptRef, BundleRef};
use trainyard_common::limits;
use trainyard_common::member::{DesiredMember, ObservedMember};

use super::InvalidField;
use crate::v1;

/// Why a set that came in pages is not taken. The assembler that says so has to be dropped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// More members than one node can have.
    #[error("set has more than {limit} members")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// A page with neither members nor the end: an endless row of them would be one set.
    #[error("page is empty and not the last one")]
    Empty,
    /// A page after the end.
    #[error("page follows the end of the set")]
    AfterEnd,
    /// A page is lost or doubled.
    #[error("set has {found} members; its end says {announced}")]
    Count {
        /// What the end says.
        announced: u32,
        /// What came.
        found: usize,
    },
    /// The members are not those that were sent.
    #[error("digest of the set is {found:08x}; its end says {announced:08x}")]
    Digest {
        /// What the end says.
        announced: u32,
        /// That of what came.
        found: u32,
    },
    /// Two members of one attempt, or the same bundle twice.
    #[error("{0} is in the set twice")]
    Duplicate(String),
    /// A member cannot be read.
    #[error("a member of the set has a bad field")]
    Member(#[source] InvalidField),
}

/// What tells the members of a set apart.
pub trait PageKey: Copy + Ord + std::fmt::Display + std::fmt::Debug {
    /// Its encoding, which the digest of the set is over.
    fn encoded(self) -> Vec<u8>;
}

impl PageKey for AttemptRef {
    fn encoded(self) -> Vec<u8> {
        v1::AttemptRef::from(self).encode_to_vec()
    }
}

impl PageKey for BundleRef {
    fn encoded(self) -> Vec<u8> {
        v1::BundleRef::from(self).encode_to_vec()
    }
}

/// A member of a set that travels in pages: a member of an attempt or a bundle, desired or observed.
pub trait Paged: Sized + TryFrom<Self::Wire, Error = InvalidField> {
    /// What it is told apart by; a set has one member of each key at most.
    type Key: PageKey;
    /// The member on the wire.
    type Wire: Message + for<'a> From<&'a Self>;
    /// The page on the wire.
    type Page;

    /// Puts a page together.
    fn page(members: Vec<Self::Wire>, end: Option<v1::SetEnd>) -> Self::Page;
    /// Takes a page apart.
    fn parts(page: Self::Page) -> (Vec<Self::Wire>, Option<v1::SetEnd>);
    /// Its key.
    fn key(&self) -> Self::Key;
}

macro_rules! paged {
    ($member:ident, $page:ident, $list:ident, $key:ident: $key_type:ident) => {
        impl Paged for $member {
            type Key = $key_type;
            type Wire = v1::$member;
            type Page = v1::$page;

            fn page($list: Vec<v1::$member>, end: Option<v1::SetEnd>) -> v1::$page {
                v1::$page { $list, end }
            }

            fn parts(page: v1::$page) -> (Vec<v1::$member>, Option<v1::SetEnd>) {
                let v1::$page { $list, end } = page;
                ($list, end)
            }

            fn key(&self) -> $key_type {
                self.$key
            }
        }
    };
}

paged!(DesiredMember, DesiredPage, members, attempt: AttemptRef);
paged!(ObservedMember, ObservedPage, members, attempt: AttemptRef);
paged!(DesiredBundle, DesiredBundlePage, bundles, bundle: BundleRef);
paged!(ObservedBundle, ObservedBundlePage, bundles, bundle: BundleRef);

/// The pages of what an agent observed; at least one.
#[must_use]
pub fn observed_pages(members: &[ObservedMember]) -> Vec<v1::ObservedPage> {
    pages(members)
}

/// The pages of what the coordinator wants; at least one.
#[must_use]
pub fn desired_pages(members: &[DesiredMember]) -> Vec<v1::DesiredPage> {
    pages(members)
}

/// Cuts a set into pages. A page is closed by the member that takes it to [`limits::PAGE_BYTES`]; one member more than
/// that still fits into a message.
#[must_use]
pub fn pages<T: Paged>(members: &[T]) -> Vec<T::Page> {
    let mut pages = Vec::new();
    let mut page = Vec::new();
    let mut page_bytes = 0;
    let mut digest = SetDigest::default();
    for member in members {
        if page_bytes >= limits::PAGE_BYTES {
            pages.push(T::page(mem::take(&mut page), None));
            page_bytes = 0;
        }
        let wire = T::Wire::from(member);
        digest.add(member.key());
        page_bytes += wire.encoded_len();
        page.push(wire);
    }
    pages.push(T::page(page, Some(digest.end())));
    pages
}

/// The digest over a set while its members pass by in order.
///
/// It covers which members there are and in which order, not everything about them: a field that only one side's
/// version knows would otherwise change it, and a set could not cross one step of version skew. Their content is in the
/// hands of TLS and protobuf.
#[derive(Debug, Clone, Default)]
pub struct SetDigest {
    hasher: crc32fast::Hasher,
    count: usize,
}

impl SetDigest {
    /// Takes one more member into account.
    pub fn add(&mut self, key: impl PageKey) {
        self.hasher.update(&key.encoded());
        self.count += 1;
    }

    /// The end marker of the set so far.
    #[must_use]
    pub fn end(&self) -> v1::SetEnd {
        v1::SetEnd {
            // A set that long is refused by its receiver long before the number does not fit.
            count: u32::try_from(self.count).unwrap_or(u32::MAX),
            digest: self.hasher.clone().finalize(),
        }
    }
}

/// Puts a set together from its pages. Holds at most [`limits::MAX_MEMBERS_PER_NODE`] members.
#[derive(Debug)]
pub struct Assembler<T: Paged> {
    members: Vec<T>,
    keys: BTreeSet<T::Key>,
    digest: SetDigest,
    ended: bool,
}

impl<T: Paged> Default for Assembler<T> {
    fn default() -> Self {
        Self {
            members: Vec::new(),
            keys: BTreeSet::new(),
            digest: SetDigest::default(),
            ended: false,
        }
    }
}

impl<T: Paged> Assembler<T> {
    /// An assembler that has seen no page.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next page; gives the whole set when it was the last one.
    ///
    /// # Errors
    /// The set cannot be complete or correct any more.
    pub fn push(&mut self, page: T::Page) -> Result<Option<Vec<T>>, PageError> {
        if self.ended {
            return Err(PageError::AfterEnd);
        }
        let (members, end) = T::parts(page);
        if members.is_empty() && end.is_none() {
            return Err(PageError::Empty);
        }
        let limit = limits::MAX_MEMBERS_PER_NODE;
        if members.len() > limit - self.members.len() {
            return Err(PageError::TooMany { limit });
        }
        for member in members {
            self.take(member)?;
        }
        end.map(|end| self.finish(end)).transpose()
    }

    fn take(&mut self, wire: T::Wire) -> Result<(), PageError> {
        let member = T::try_from(wire)
            .map_err(|e| PageError::Member(e.under(&format!("members[{}]", self.members.len()))))?;
        let key = member.key();
        self.digest.add(key);
        if !self.keys.insert(key) {
            return Err(PageError::Duplicate(key.to_string()));
        }
        self.members.push(member);
        Ok(())
    }

    fn finish(&mut self, announced: v1::SetEnd) -> Result<Vec<T>, PageError> {
        self.ended = true;
        let found = self.digest.end();
        if announced.count != found.count {
            return Err(PageError::Count {
                announced: announced.count,
                found: self.members.len(),
            });
        }
        if announced.digest != found.digest {
            return Err(PageError::Digest {
                announced: announced.digest,
                found: found.digest,
            });
        }
        Ok(mem::take(&mut self.members))
    }
}
