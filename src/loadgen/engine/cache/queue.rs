//! The free queue: blocks that nobody uses, the one to be taken next in front. A doubly linked list
//! over block numbers, so that a block that is used again leaves from the middle in constant time
//! (vLLM's `FreeKVCacheBlockQueue`).

/// Not in the queue.
const OUT: u32 = u32::MAX;

/// See the module's page.
#[derive(Clone, Debug)]
pub(super) struct FreeQueue {
    // One more than there are blocks: the last is the sentinel, before the first and after the last.
    next: Vec<u32>,
    previous: Vec<u32>,
    len: usize,
}

impl FreeQueue {
    /// All blocks `0..blocks`, in order.
    pub(super) fn full(blocks: u32) -> Self {
        let mut queue = Self {
            next: vec![OUT; blocks as usize + 1],
            previous: vec![OUT; blocks as usize + 1],
            len: 0,
        };
        queue.next[blocks as usize] = blocks;
        queue.previous[blocks as usize] = blocks;
        for block in 0..blocks {
            queue.push(block);
        }
        queue
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Appends a block that is not in the queue.
    pub(super) fn push(&mut self, block: u32) {
        self.insert_before(self.sentinel(), block);
    }

    /// Puts a block that is not in the queue in front.
    pub(super) fn push_front(&mut self, block: u32) {
        self.insert_before(self.next[self.sentinel() as usize], block);
    }

    /// Takes the block in front.
    pub(super) fn pop(&mut self) -> Option<u32> {
        let first = self.next[self.sentinel() as usize];
        if first == self.sentinel() {
            return None;
        }
        self.remove(first);
        Some(first)
    }

    /// Takes a block out; does nothing if it is not in the queue.
    pub(super) fn remove(&mut self, block: u32) {
        let (previous, next) = (self.previous[block as usize], self.next[block as usize]);
        if next == OUT {
            return;
        }
        self.next[previous as usize] = next;
        self.previous[next as usize] = previous;
        self.next[block as usize] = OUT;
        self.previous[block as usize] = OUT;
        self.len -= 1;
    }

    #[cfg(test)]
    /// The blocks, the next to be taken first.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let end = self.sentinel();
        let first = self.next[end as usize];
        std::iter::successors((first != end).then_some(first), move |&block| {
            let next = self.next[block as usize];
            (next != end).then_some(next)
        })
    }

    /// Inserts a block that is not in the queue before one that is.
    pub(super) fn insert_before(&mut self, next: u32, block: u32) {
        let previous = self.previous[next as usize];
        self.next[block as usize] = next;
        self.previous[block as usize] = previous;
        self.next[previous as usize] = block;
        self.previous[next as usize] = block;
        self.len += 1;
    }

    /// Stands before the first block and after the last.
    pub(super) fn sentinel(&self) -> u32 {
        self.next.len() as u32 - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_leave_from_anywhere_and_come_back_at_the_end() {
        let mut queue = FreeQueue::full(4);
        assert_eq!(queue.iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
        queue.remove(1);
        queue.remove(1);
        assert_eq!((queue.pop(), queue.len()), (Some(0), 2));
        queue.push(1);
        queue.push(0);
        assert_eq!(queue.iter().collect::<Vec<_>>(), [2, 3, 1, 0]);
        queue.remove(0);
        queue.push_front(0);
        let rest: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(rest, [0, 2, 3, 1]);
        assert_eq!((queue.pop(), queue.len()), (None, 0));
    }
}
