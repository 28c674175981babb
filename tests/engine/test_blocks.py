import random

from amalgam.engine.blocks import BlockPool, extend_keys
from tests.errors import raises


def test_blocks_are_handed_out_once_and_come_back():
    pool = BlockPool(4)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.num_free == 0
    pool.free(first)
    assert pool.num_free == 3
    assert sorted(pool.allocate(3)) == sorted(first)


def test_what_nobody_has_had_is_counted():
    pool = BlockPool(6)
    pool.free(publish(pool, [b"a", b"b"]))
    pool.free(pool.allocate(1))
    assert pool.num_untouched == 3  # blocks without a key are handed out before those with one
    pool.free(pool.allocate(1))
    assert pool.num_untouched == 3
    pool.allocate(6)
    assert pool.num_untouched == 0


def test_misuse_is_an_assertion():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with raises(AssertionError):
        pool.free(blocks)
    with raises(AssertionError, 3, 2):
        pool.allocate(3)


def publish(pool, keys, version_id=1):
    block_ids = pool.allocate(len(keys))
    for key, block_id in zip(keys, block_ids, strict=True):
        pool.publish(version_id, key, block_id)
    return block_ids


def test_full_blocks_are_found_until_they_are_handed_out_again():
    pool = BlockPool(4)
    block_ids = publish(pool, [b"a", b"b", b"c"])
    assert pool.find(1, [b"a", b"b", b"x", b"c"]) == block_ids[:2]
    assert pool.find(2, [b"a"]) == pool.find(1, [b"b"])[1:] == []
    pool.free(reversed(block_ids))
    assert pool.num_free == 4
    assert pool.allocate(2)[1] == block_ids[2]  # first the one without a key, then the one freed first
    assert pool.find(1, [b"a", b"b", b"c"]) == block_ids[:2]


def test_shared_blocks_are_free_when_the_last_one_leaves():
    pool = BlockPool(3)
    block_ids = publish(pool, [b"a", b"b"])
    pool.share(block_ids)
    pool.free(block_ids)
    assert (pool.num_free, pool.count_free(block_ids)) == (1, 0)
    pool.free(block_ids)
    assert (pool.num_free, pool.count_free(block_ids)) == (3, 2)
    pool.share(block_ids[:1])
    assert pool.allocate(2)[1] == block_ids[1]
    with raises(AssertionError):
        pool.free(block_ids[1:] * 2)


def test_what_is_forgotten_is_found_by_nobody_and_comes_back():
    pool = BlockPool(3)
    block_ids = publish(pool, [b"a", b"b"])
    pool.share(block_ids)
    pool.forget([*block_ids, *pool.allocate(1)])
    assert pool.find(1, [b"a"]) == [] and not pool.version_ids
    pool.free(block_ids)
    pool.free(block_ids)
    assert pool.num_free == 2 and pool.count_free(block_ids) == 2
    assert sorted(pool.allocate(2)) == sorted(block_ids)


def test_of_two_blocks_with_one_key_the_first_is_found():
    pool = BlockPool(2)
    [first], [second] = publish(pool, [b"a"]), publish(pool, [b"a"])
    pool.free([second, first])
    assert pool.find(1, [b"a"]) == [first]
    assert pool.allocate(1) == [second]


def test_a_version_is_forgotten_while_its_blocks_are_in_use():
    pool = BlockPool(3)
    used, free = publish(pool, [b"a", b"b"])
    publish(pool, [b"a"], version_id=2)
    pool.free([free])
    pool.forget_version(1)
    pool.forget_version(7)
    assert pool.version_ids == {2} and pool.find(1, [b"a"]) == []
    pool.free([used])
    assert sorted(pool.allocate(2)) == sorted([used, free])


def test_a_key_stands_for_all_tokens_up_to_the_blocks_end():
    keys, others, again = [], [], []
    extend_keys(keys, [1, 2, 3, 4, 5, 6], 2, 3)
    extend_keys(others, [1, 2, 9, 4, 5, 6], 2, 3)
    for count in (1, 2, 3):
        extend_keys(again, [1, 2, 3, 4, 5, 6], 2, count)
    assert keys == again
    assert [one == other for one, other in zip(keys, others, strict=True)] == [True, False, False]


def test_random_use_keeps_the_books():
    """Every block is in use by as many as hold it, or free; what is found holds what it should."""
    rng, pool = random.Random(3), BlockPool(12)
    held, contents = [], {}
    for _ in range(4000):
        if held and rng.random() < 0.5:
            block_ids = held.pop(rng.randrange(len(held)))
            pool.free(reversed(block_ids))
        else:
            version_id = rng.randint(1, 2)
            keys = [bytes([rng.randrange(3)]) * (place + 1) for place in range(rng.randint(1, 4))]
            found = pool.find(version_id, keys)
            assert [contents[block_id] for block_id in found] == [(version_id, key) for key in keys[: len(found)]]
            if len(keys) - len(found) + pool.count_free(found) > pool.num_free:
                continue
            pool.share(found)
            new = pool.allocate(len(keys) - len(found))
            for key, block_id in zip(keys[len(found) :], new, strict=True):
                contents[block_id] = version_id, key
                pool.publish(version_id, key, block_id)
            held.append([*found, *new])
        if rng.random() < 0.02:
            pool.forget_version(rng.randint(1, 2))
        assert pool.num_free == 12 - len({block_id for block_ids in held for block_id in block_ids})
