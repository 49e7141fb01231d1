//! A batch in groups: the model takes images of one size at a time, and the photos of one folder may have many.

use anyhow::{Result, bail};

/// What there is of each group of a batch, with the places that its items have in the batch.
pub(crate) struct Alike<R> {
    items: usize,
    groups: Vec<(Vec<usize>, R)>,
}

impl<R> Alike<R> {
    /// What `make` makes of items of one `kind` at a time, `most` at most.
    pub(crate) fn of<T, K: PartialEq>(
        items: &[T],
        most: usize,
        kind: impl Fn(&T) -> K,
        mut make: impl FnMut(&[&T]) -> Result<R>,
    ) -> Result<Self> {
        let mut groups = Vec::new();
        let mut left: Vec<usize> = (0..items.len()).collect();
        while let Some(&first) = left.first() {
            let wanted = kind(&items[first]);
            let (alike, others): (Vec<_>, Vec<_>) = left.into_iter().partition(|&i| kind(&items[i]) == wanted);
            for chunk in alike.chunks(most.max(1)) {
                let made = make(&chunk.iter().map(|&i| &items[i]).collect::<Vec<_>>())?;
                groups.push((chunk.to_vec(), made));
            }
            left = others;
        }
        Ok(Self { items: items.len(), groups })
    }

    /// The same groups, each with what `compute` makes of what it had.
    pub(crate) fn map<S>(self, mut compute: impl FnMut(R) -> Result<S>) -> Result<Alike<S>> {
        let Self { items, groups } = self;
        let groups = groups.into_iter().map(|(places, group)| Ok((places, compute(group)?))).collect::<Result<_>>()?;
        Ok(Alike { items, groups })
    }

    /// The items of the whole batch in their order, from those that `split` makes of each group. What filled up a group is
    /// left out: the first of a group's items count.
    pub(crate) fn into_items<I>(self, mut split: impl FnMut(R) -> Result<Vec<I>>) -> Result<Vec<I>> {
        let mut items: Vec<Option<I>> = (0..self.items).map(|_| None).collect();
        for (places, group) in self.groups {
            let made = split(group)?;
            if made.len() < places.len() {
                bail!("{} results of {} images", made.len(), places.len());
            }
            places.into_iter().zip(made).for_each(|(place, item)| items[place] = Some(item));
        }
        Ok(items.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_of_one_kind_and_results_in_order() {
        let items = ["a", "bb", "c", "d", "ee", "f", ""];
        let groups =
            Alike::of(&items, 3, |item| item.len(), |group| Ok(group.iter().copied().copied().collect::<String>()))
                .unwrap();
        let made: Vec<&str> = groups.groups.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(made, ["acd", "f", "bbee", ""]);
        let split = |group: Vec<String>| Ok(group);
        let chars = |text: String| Ok(text.chars().map(String::from).collect::<Vec<_>>());
        let numbered = groups.map(chars).unwrap().into_items(split);
        assert_eq!(numbered.unwrap_err().to_string(), "0 results of 1 images");

        let lengths = Alike::of(&items, 2, |item| item.len(), |group| Ok(group.iter().map(|x| x.len()).collect()));
        // One more than a group has: what fills up a batch.
        let filled = |mut group: Vec<usize>| {
            group.push(9);
            Ok(group)
        };
        assert_eq!(lengths.unwrap().into_items(filled).unwrap(), [1, 2, 1, 1, 2, 1, 0]);
    }
}
