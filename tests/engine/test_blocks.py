from amalgam.engine.blocks import BlockPool
from tests.errors import raises


def test_blocks_are_handed_out_once_and_come_back():
    pool = BlockPool(4)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.num_free == 0
    pool.free(first)
    assert pool.num_free == 3
    assert sorted(pool.allocate(3)) == sorted(first)


def test_misuse_is_an_assertion():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with raises(AssertionError):
        pool.free(blocks)
    with raises(AssertionError, 3, 2):
        pool.allocate(3)
